"""What is left out: the first of equals stays, near duplicates are found, and who worked on what changes nothing."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data import clean as module
from data.clean import CleanConfig, CleanError, Mark, Marker, NearConfig, decide, filter_verdict, sketch, verdicts

SHARED = Path(__file__).parents[3] / "shared" / "data"
KEPT, DUPLICATE, NEAR = 0, 1, 2
PROSE = (
    "The committee met for the first time in March and agreed that the harbour should be rebuilt before the winter. "
    "Engineers from three towns came to look at the old walls. They found that most of the stones could be used again! "
    "Nobody had expected this. It would save a third of the money, and that was enough to begin with the work.\n"
    "In the years after the war the town grew quickly, as people from the villages came to find work in the yards. "
    "Would there be houses for all of them? The council thought so. It was wrong, and many lived in tents for months."
)


def judge(folder, texts, cfg, cuts=(), held=()):
    """Verdicts on texts that lie in units ending at cuts; held: numbers of the held-out ones."""
    bounds = [0, *cuts, len(texts)]
    prefixes = []
    for number, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        marker = Marker(folder / f"{number:05d}", cfg)
        for start in range(begin, end, 7):  # batches that end anywhere
            some = range(start, min(start + 7, end))
            marks = [module.mark(texts[i], texts[i].encode(), i in held, cfg) for i in some]
            marker.add([texts[i] for i in some], marks)
        marker.close()
        prefixes.append(folder / f"{number:05d}")
    decide(prefixes, cfg)
    return np.concatenate([verdicts(prefix) for prefix in prefixes])


def words(rng, count):
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def changed(rng, text, share):
    """The words of text with a share of them exchanged, one by one."""
    return [f"x{rng.randrange(10**6)}" if rng.random() < share else word for word in text]


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_of_equal_texts_the_first_stays(tmp_path, seed):
    rng = random.Random(seed)
    texts = [f"text {rng.randrange(30)}" for _ in range(rng.randrange(1, 80))]
    cuts = sorted(rng.randrange(len(texts) + 1) for _ in range(rng.randrange(4)))  # units may be empty
    expected = [DUPLICATE if text in texts[:i] else KEPT for i, text in enumerate(texts)]
    assert judge(tmp_path, texts, CleanConfig(exact=True), cuts).tolist() == expected


def test_a_difference_of_a_space_is_no_duplicate(tmp_path):
    assert judge(tmp_path, ["a b", "a  b", "a b ", "a B"], CleanConfig(exact=True)).tolist() == [KEPT] * 4


def test_hashes_that_agree_in_one_half_are_no_duplicates(tmp_path):
    marker = Marker(tmp_path / "00000", CleanConfig(exact=True))
    marker.add(
        ["", "", "", ""], [Mark(0, False, 1, 1), Mark(0, False, 1, 2), Mark(0, False, 2, 1), Mark(0, False, 1, 2)]
    )
    marker.close()
    decide([tmp_path / "00000"], CleanConfig(exact=True))
    assert verdicts(tmp_path / "00000").tolist() == [KEPT, KEPT, KEPT, DUPLICATE]


def test_a_filtered_document_is_no_first(tmp_path):
    """Else the text would be lost where the filters differ by what they see; and counts say why each one went."""
    cfg = CleanConfig(exact=True, filters=["gopher_quality"])
    found = judge(tmp_path, ["short", PROSE, "short", PROSE], cfg)
    assert [cfg.reason(verdict) for verdict in found] == [
        "filter:gopher_quality",
        "",
        "filter:gopher_quality",
        "duplicate",
    ]


def test_nothing_at_all(tmp_path):
    assert judge(tmp_path, [], CleanConfig(exact=True, near=NearConfig())).tolist() == []
    decide([], CleanConfig(exact=True, near=NearConfig()))


# -- near --------------------------------------------------------------------------------------------------------------


def test_near_duplicates_are_found_and_others_are_not(tmp_path):
    """Pairs of 400 words at known similarity of their sets of 5-word shingles, which stands 5 standard errors (of a
    share of 128 slots) off the threshold: all of one kind found, none of the other."""
    rng = random.Random(0)
    texts, similarity = [], []
    while len(similarity) < 150:
        first = words(rng, 400)
        second = changed(rng, first, rng.choice([0.0, 0.002, 0.06, 0.2]))
        sets = [{tuple(text[i : i + 5]) for i in range(396)} for text in (first, second)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        if abs(jaccard - 0.75) > 5 * (0.75 * 0.25 / 128) ** 0.5:
            texts += [" ".join(first), " ".join(second)]
            similarity.append(jaccard)
    found = judge(tmp_path, texts, CleanConfig(near=NearConfig(threshold=0.75)), cuts=(50, 51, 200))
    assert found[::2].tolist() == [KEPT] * 150
    assert found[1::2].tolist() == [NEAR if jaccard > 0.75 else KEPT for jaccard in similarity]
    assert 30 < (found == NEAR).sum() < 120


def test_the_signature_estimates_the_similarity():
    """Mean over 60 pairs of the share of equal slots: the standard error of one is at most 0.045."""
    rng = random.Random(1)
    near = NearConfig(shingle_size=1)
    off = []
    for _ in range(60):
        first = words(rng, 200)
        second = changed(rng, first, rng.random())
        exact = len(set(first) & set(second)) / len(set(first) | set(second))
        left, right = sketch([" ".join(first), " ".join(second)], near)
        off.append((left == right).mean() - exact)
    assert abs(np.mean(off)) < 4 * 0.045 / 60**0.5
    assert max(map(abs, off)) < 5 * 0.045


@pytest.mark.parametrize("seed", range(8))
def test_neither_units_nor_batches_matter(tmp_path, seed):
    rng = random.Random(seed)
    base = [words(rng, 60) for _ in range(15)]
    texts = [" ".join(changed(rng, rng.choice(base), rng.choice([0, 0.01, 0.03]))) for _ in range(120)]
    cfg = CleanConfig(exact=rng.random() < 0.5, near=NearConfig(threshold=0.7, num_perm=64, seed=seed))
    held = {i for i in range(120) if rng.random() < 0.2}
    found = []
    for number in range(3):
        (folder := tmp_path / str(number)).mkdir()
        cuts = sorted(rng.randrange(121) for _ in range(number * 4))
        found.append(judge(folder, texts, cfg, cuts, held).tolist())
    assert found[0] == found[1] == found[2]
    assert NEAR in found[0]


def test_held_out_documents_come_first_however_late_they_are(tmp_path):
    rng = random.Random(2)
    text = words(rng, 200)
    texts = [" ".join(changed(rng, text, 0.005)) for _ in range(6)]
    assert judge(tmp_path, texts, CleanConfig(near=NearConfig()), (3,)).tolist() == [KEPT] + [NEAR] * 5
    assert judge(tmp_path, texts, CleanConfig(near=NearConfig()), (3,), held={4}).tolist() == [NEAR] * 4 + [KEPT, NEAR]


def test_characters_for_chinese(tmp_path):
    """One character of 48 exchanged: 5-word shingles see a sentence as one word, 3-character ones see that it is alike."""
    poem = "巖廊罷機務崇文聊駐輦玉匣啓龍圖金繩披鳳篆韋編斷仍續縹帙舒還卷對此乃淹留欹案觀墳典帝京篇十首二太宗皇帝"
    other = "移步出詞林停輿欣武宴琱弓寫明月駿馬疑流電驚雁落虛弦啼猿悲急箭閱賞誠多美於茲乃忘倦帝京篇十首三太宗皇帝"
    texts = [poem, poem.replace("鳳", "龍"), other, "\n".join(other)]
    by_characters = NearConfig(shingle="characters", shingle_size=3, threshold=0.7)
    assert judge(tmp_path, texts, CleanConfig(near=by_characters)).tolist() == [KEPT, NEAR, KEPT, NEAR]
    assert judge(tmp_path, texts, CleanConfig(near=NearConfig(threshold=0.7))).tolist() == [KEPT] * 4


@pytest.mark.parametrize("shingle", ["words", "characters"])
def test_texts_shorter_than_a_shingle(tmp_path, shingle):
    texts = ["one two", "one three", "One two", " ", "\n", " ", "", "one two"]
    found = judge(tmp_path, texts, CleanConfig(near=NearConfig(shingle=shingle)))
    assert found.tolist() == [KEPT, KEPT, NEAR, KEPT, KEPT, NEAR, KEPT, NEAR]


def test_ten_thousand_copies_take_no_quadratic_work(tmp_path):
    texts = [PROSE] * 10_000 + ["another text of its own, with some words in it"]
    found = judge(tmp_path, texts, CleanConfig(near=NearConfig()), (6_000,))
    assert (found == NEAR).sum() == 9_999
    assert found[0] == found[-1] == KEPT


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold):
    near = NearConfig(threshold=threshold)
    bands = near.num_perm // near.rows
    assert bands * near.rows == near.num_perm
    assert 1 - (1 - threshold**near.rows) ** bands >= 0.99


def test_the_sketch_depends_on_text_and_seed_alone():
    """A fixed value: signatures are kept on disk between two starts, and of several nodes compared with each other."""
    texts = [PROSE, "\u592a\u5b97\u7687\u5e1d" * 9]
    assert (sketch(texts, NearConfig())[1] == sketch(texts[1:], NearConfig())[0]).all()
    assert (sketch(texts, NearConfig()) != sketch(texts, NearConfig(seed=1))).mean() > 0.9
    assert xxhash.xxh3_64_hexdigest(sketch(texts, NearConfig()).tobytes()) == "9ce7df6dd40a569c"


# -- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rejected"),
    [
        ("gopher_quality", "# " * 60 + PROSE),
        ("gopher_quality", "too short"),
        ("gopher_repetition", "the same line again\n" * 30),
        ("c4", PROSE.replace("harbour", "{harbour}")),
        ("c4", "no sentence ends here\n" * 9),
        ("fineweb", "\n".join(PROSE.split())),
    ],
)
def test_filters_reject(name, rejected):
    cfg = CleanConfig(filters=[name])
    assert cfg.reason(filter_verdict(rejected, cfg)) == f"filter:{name}"
    assert filter_verdict(PROSE, cfg) == 0


def test_the_first_filter_to_reject_gives_the_reason():
    cfg = CleanConfig(filters=["fineweb", "gopher_quality"])
    assert cfg.reason(filter_verdict("too short", cfg)) == "filter:fineweb"
    assert CleanConfig().reason(filter_verdict("too short", CleanConfig())) == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared corpora")
def test_filters_keep_most_of_an_encyclopedia():
    text = (SHARED / "wikitext2-valid.txt").read_text().replace("<unk>", "unknown").replace(" @-@ ", "-")
    articles = [part for part in text.split("\n = ") if len(part) > 2000][:40]
    assert len(articles) > 10
    for name in ("gopher_quality", "gopher_repetition"):
        kept = sum(filter_verdict(article, CleanConfig(filters=[name])) == 0 for article in articles)
        assert kept > 0.5 * len(articles), name


ALL_FILTERS = CleanConfig(filters=["c4", "fineweb", "gopher_repetition", "gopher_quality"])


@settings(deadline=None, max_examples=150)
@given(st.text(min_size=1) | st.text(alphabet=" \n\t.!\u3000\u200b\x00\x1cab\u4e00-", min_size=1, max_size=400))
def test_filters_and_sketches_take_any_text(text):
    for number in range(4):
        filter_verdict(text, ALL_FILTERS.model_copy(update={"filters": ALL_FILTERS.filters[number:]}))
    for shingle in ("words", "characters"):
        assert sketch([text], NearConfig(shingle=shingle)).shape == (1, 128)


def test_filters_need_no_spacy_nltk_or_torch():
    script = (
        "import sys\nfrom data.clean import CleanConfig, filter_verdict\n"
        "filter_verdict('Some words. ' * 50, "
        "CleanConfig(filters=['gopher_quality', 'gopher_repetition', 'c4', 'fineweb']))\n"
        "print(sorted({'spacy', 'nltk', 'torch', 'transformers', 'stanza'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_missing_libraries_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    module._judges.cache_clear()
    with pytest.raises(CleanError, match=r"data.clean.near needs rensa .*pip install 'longhaul\[clean\]'"):
        CleanConfig(near=NearConfig()).check_installed()
    with pytest.raises(
        CleanError, match=r"data.clean.filters=\['c4'\] needs datatrove .*pip install 'longhaul\[clean\]'"
    ):
        CleanConfig(filters=["c4"]).check_installed()
    CleanConfig(exact=True).check_installed()
