"""Encoded examples: which token has a label, that nothing but answers is a target, and which rank reads what."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.chat import ANSWERS, Conversation, Message, encode_conversations, open_template
from data.classify import encode_examples, frame_of
from data.errors import DataError
from data.examples import Example, Sentence
from data.loader import IGNORE
from data.row_loader import Row, RowLoader, RowSet, eval_rows, same_data, take
from data.tag import encode_sentences
from data.task import ClassifyTask, TagTask
from data.tokenizer import TokenizerConfig, load_tokenizer, train

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3's does with what it has thought: earlier answers are written in another way than the last one
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ '...' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def piece(texts, tmp_path_factory):
    """A SentencePiece tokenizer."""
    folder = tmp_path_factory.mktemp("piece") / "t"
    return train([(texts, 200_000)], folder, TokenizerConfig(vocab_size=600, train_bytes=200_000))


@pytest.fixture(scope="module")
def byte_level(texts, tmp_path_factory):
    """byte_level(template) -> a Hugging Face tokenizer that comes with a chat template, or None."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)

    def make(template=None):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=special[0], additional_special_tokens=special[1:]
        )
        fast.chat_template = template
        folder = tmp_path_factory.mktemp("byte_level") / "t"
        fast.save_pretrained(folder)
        return load_tokenizer(folder)

    return make


@pytest.fixture(params=["piece", "byte_level"])
def tokenizer(request):
    found = request.getfixturevalue(request.param)
    return found() if request.param == "byte_level" else found


def classify(**options):
    return ClassifyTask(kind="classify", labels=["no", "yes"], train=["-"], **options)


def tag(**options):
    return TagTask(kind="tag", labels=["O", "B-PER", "I-PER"], train=["-"], **options)


# -- labels --------------------------------------------------------------------------------------------------------------


def test_a_text_has_its_label_at_its_last_token(tokenizer):
    examples = [Example("f, line 1", "import json", "yes"), Example("f, line 2", "def main(argv):", "no")]
    rows = encode_examples(examples, tokenizer, 64, classify())
    for row, example, label in zip(rows.rows, examples, [1, 0], strict=True):
        assert row.tokens.tolist() == tokenizer.encode(example.text).tolist()
        assert row.targets.tolist() == [IGNORE] * (len(row.tokens) - 1) + [label]
    assert rows.where == ["f, line 1", "f, line 2"]
    assert rows.notes == []


def test_long_texts_are_refused_or_cut_and_counted(tokenizer):
    examples = [Example(f"f, line {n}", "import json, os, sys " * n, "yes") for n in (1, 5, 9)]
    n = len(tokenizer.encode(examples[1].text))
    with pytest.raises(
        DataError, match=rf"f, line 5: the text has {n} tokens, model.seq_len=30 .*and 1 more of 3 texts"
    ):
        encode_examples(examples, tokenizer, 30, classify())
    rows = encode_examples([*examples, Example("f, line 10", "", "no")], tokenizer, 30, classify(too_long="cut"))
    assert [len(row.tokens) for row in rows.rows[1:]] == [30, 30]
    assert [row.targets[-1] for row in rows.rows] == [1, 1, 1]
    assert rows.notes == ["2 of 3 texts are cut at 30 tokens", "1 empty texts are left out"]


WORDS = ["Ada", "Byron", "wrote", "中", "!"]
TAGS = ["B-PER", "I-PER", "O", "O", "O"]


@pytest.mark.parametrize("join", [" ", ""])
@pytest.mark.parametrize("which", ["first", "last"])
def test_each_word_has_its_tag_at_one_token(tokenizer, join, which):
    task = tag(join=join, word_token=which)
    (row,) = encode_sentences([Sentence("f, line 1", WORDS, TAGS)], tokenizer, 64, task).rows
    assert tokenizer.decode(row.tokens) == join.join(WORDS)
    at = np.flatnonzero(row.targets != IGNORE)
    assert [task.labels[label] for label in row.targets[at]] == TAGS
    begins = [0, *np.cumsum([len(tokenizer.encode(join * bool(n) + word)) for n, word in enumerate(WORDS)]).tolist()]
    assert at.tolist() == (begins[:-1] if which == "first" else [begin - 1 for begin in begins[1:]])


def test_words_get_the_tokens_that_transformers_gives_them(byte_level):
    tokenizer = byte_level()
    (row,) = encode_sentences([Sentence("f, line 1", WORDS, TAGS)], tokenizer, 64, tag()).rows
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder, add_prefix_space=False)
    spelled = [WORDS[0], *(f" {word}" for word in WORDS[1:])]
    found = theirs(spelled, is_split_into_words=True)
    assert row.tokens.tolist() == found.input_ids
    words = found.word_ids()
    first = [n == 0 or word != words[n - 1] for n, word in enumerate(words)]
    assert (row.targets != IGNORE).tolist() == first


def test_words_behind_a_cut_are_counted(tokenizer):
    sentence = Sentence("f, line 1", WORDS * 10, TAGS * 10)
    with pytest.raises(DataError, match=r"f, line 1: the text has \d+ tokens, model.seq_len=20 is the longest; say"):
        encode_sentences([sentence], tokenizer, 20, tag())
    rows = encode_sentences([sentence], tokenizer, 20, tag(too_long="cut"))
    left = int((rows.rows[0].targets != IGNORE).sum())
    assert rows.notes == [f"1 of 1 sentences are cut at 20 tokens; {50 - left} words have no target"]


# -- conversations -------------------------------------------------------------------------------------------------------


def conversation(*contents, system=None, where="f, line 1"):
    """user, assistant, user, ... in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    return Conversation(where, [Message("system", system), *messages] if system else messages)


CHATS = [
    conversation("import what?", "import json"),
    conversation("a", "b", "And then?", "return None", system="Be brief."),
    conversation("c", "class Error(Exception):\n    pass"),
]


def spelled(row, tokenizer):
    """What the row's targets say, as text with the ends of answers; one string for each stretch of targets."""
    found, ids = [], []
    for target in [*row.targets.tolist(), IGNORE]:
        if target != IGNORE:
            ids.append(target)
        elif ids:
            found.append((tokenizer.decode(ids), ids[-1]))
            ids = []
    return found


def answers(conversations):
    return sorted(m.content for each in conversations for m in each.messages if m.role == ANSWERS)


def test_only_answers_and_their_ends_are_targets(tokenizer):
    template = open_template(None, tokenizer)
    rows = encode_conversations(CHATS, template, 128, "refuse")
    found = [stretch for row in rows.rows for stretch in spelled(row, tokenizer)]
    assert sorted(text for text, _ in found) == answers(CHATS)
    assert {end for _, end in found} == {tokenizer.eos_id}
    assert rows.n_bytes == sum(len(text) for text in answers(CHATS))
    for row in rows.rows:  # a target is the next token, of the same conversation
        at = np.flatnonzero(row.targets != IGNORE)
        at = at[at + 1 < len(row.tokens)]
        assert (row.targets[at] == row.tokens[at + 1]).all()
        assert (row.documents[at] == row.documents[at + 1]).all()
        assert (np.diff(row.documents) >= 0).all()


def test_the_plain_template_is_as_documented(tokenizer):
    parts = open_template("plain", tokenizer).parts(CHATS[1].messages, "")
    text = "".join(tokenizer.decode(part.ids) for part in parts)
    assert text == (
        "### System:\nBe brief.\n\n### User:\na\n\n### Assistant:\nb### User:\nAnd then?\n\n### Assistant:\nreturn None"
    )
    assert parts[1].ids[-1] == parts[3].ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize("name", ["plain", "tokenizer"])
def test_a_prompt_has_the_tokens_that_were_trained_on(byte_level, name):
    tokenizer = byte_level(CHATML)
    template = open_template(name, tokenizer)
    whole = np.concatenate([part.ids for part in template.parts(CHATS[1].messages, "")]).tolist()
    for asked in (2, 4):
        prompt = template.prompt(CHATS[1].messages[:asked])
        assert whole[: len(prompt)] == prompt
        answer = tokenizer.encode(CHATS[1].messages[asked].content).tolist()
        assert whole[len(prompt) : len(prompt) + len(answer) + 1][-1] in template.stop_ids


def test_a_tokenizers_own_template_is_used_where_there_is_one(byte_level):
    tokenizer = byte_level(CHATML)
    template = open_template(None, tokenizer)
    im_end = tokenizer.special_tokens.index("<|im_end|>")
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    expected = theirs.apply_chat_template([m._asdict() for m in CHATS[1].messages], tokenize=True)
    expected = expected if isinstance(expected, list) else expected["input_ids"]
    assert np.concatenate([part.ids for part in template.parts(CHATS[1].messages, "")]).tolist() == expected
    rows = encode_conversations(CHATS, template, 128, "refuse")
    found = [text.removesuffix("\n") for row in rows.rows for text, _ in spelled(row, tokenizer)]
    assert sorted(found) == answers(CHATS)
    assert theirs.convert_tokens_to_ids("<|im_end|>") in template.stop_ids
    assert im_end >= 0


def test_templates_that_cannot_be_used(byte_level):
    with pytest.raises(DataError, match="task.template=tokenizer, but the tokenizer in .* comes with no chat template"):
        open_template("tokenizer", byte_level())
    with pytest.raises(
        DataError, match="f, line 1, message 4: the tokenizer's chat template writes what came before it"
    ):
        encode_conversations(
            [conversation("a", "b", "c", "d")], open_template(None, byte_level(FORGETFUL)), 128, "refuse"
        )
    with pytest.raises(DataError, match=r"f, line 1, message 1 has the special token '<\|im_end\|>' in its text"):
        encode_conversations([conversation("a<|im_end|>", "b")], open_template(None, byte_level(CHATML)), 128, "refuse")
    with pytest.raises(DataError, match="ends an answer with no special token"):
        open_template(None, byte_level("{% for m in messages %}{{ m.content }}{% endfor %}"))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    template = open_template(None, byte_level(refusing))
    with pytest.raises(DataError, match="f, line 1: the tokenizer's chat template refuses it: no system"):
        encode_conversations([conversation("a", "b", system="x")], template, 128, "refuse")


def test_long_conversations_are_refused_or_cut_and_counted(tokenizer):
    long = conversation("a", "import json, os, sys " * 20)
    silent = conversation("import json, os, sys " * 20, "b")
    template = open_template("plain", tokenizer)
    with pytest.raises(DataError, match=r"f, line 1: the text has \d+ tokens, model.seq_len=40 is the longest"):
        encode_conversations([*CHATS, long], template, 40, "refuse")
    rows = encode_conversations([CHATS[0], long, silent], template, 40, "cut")
    assert rows.notes == [
        "2 of 3 conversations are cut at 40 tokens",
        "1 of them have no answer before the cut and are left out",
    ]
    assert max(len(row.tokens) for row in rows.rows) <= 40


# -- batches -------------------------------------------------------------------------------------------------------------


def row_set(n=13, seq_len=40):
    """Row k has k + 1 tokens, all k."""
    rows = [Row(np.full(k + 1, k), np.append(np.full(k, IGNORE), k)) for k in range(n)]
    return RowSet(rows, [f"f, line {k}" for k in range(n)], seq_len)


def loaders(dp_size, samples=0, micro_batch_size=1, left_out=(), rows=None):
    return [
        RowLoader(
            rows or row_set(), seed=3, global_batch_size=6, micro_batch_size=micro_batch_size, dp_rank=rank,
            dp_size=dp_size, cursor={"samples": samples, "examples": "x"}, left_out=left_out,
        )
        for rank in range(dp_size)
    ]  # fmt: skip


def read(dp_size, steps, samples=0, **options):
    """For each step, (sample, row) in the order of samples."""
    ranks, found = loaders(dp_size, samples, **options), []
    for _ in range(steps):
        batches = [next(rank) for rank in ranks]
        assert len({batch.span for batch in batches}) == 1
        pairs = []
        for batch in batches:
            first = batch.tokens[:, :, 0]
            pairs += zip(batch.samples.ravel().tolist(), first.ravel().tolist(), strict=True)
            assert batch.n_targets == int((batch.targets != IGNORE).sum())
        found.append(sorted(pairs))
    return found


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(2, 1), (3, 2), (6, 1), (1, 6)])
def test_what_a_step_reads_does_not_depend_on_the_world(dp_size, micro_batch_size):
    assert read(dp_size, 5, micro_batch_size=micro_batch_size) == read(1, 5)


def test_each_example_is_read_once_an_epoch_in_another_order():
    samples = [row for step in read(2, 13) for _, row in step]  # 78 samples: 6 epochs of 13
    epochs = [samples[at : at + 13] for at in range(0, 78, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_it_goes_on_where_the_cursor_stands():
    (loader,) = loaders(1)
    for _ in range(3):
        next(loader)
    cursor = loader.cursor()
    assert cursor == {"samples": 18, "examples": "x"}
    assert read(3, 2, cursor["samples"], micro_batch_size=2) == read(1, 5)[3:]
    assert RowLoader.merge_cursors([cursor, dict(cursor)]) == cursor


def test_left_out_samples_are_passed_over():
    assert take(4, 3, [(5, 6), (8, 8)]) == (pytest.approx([4, 7, 9]), 10)
    found = read(2, 2, left_out=[(2, 4)])
    assert [sample for step in found for sample, _ in step] == [0, 1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def test_rows_are_padded_behind_and_batches_are_short():
    rows = row_set(12)
    tokens, targets, documents = rows.batch([2, 9])
    assert tokens.shape == (2, 16)  # 10 tokens, padded to a multiple of 8
    assert (tokens[0] == 2).sum() == 3
    assert (targets != IGNORE).nonzero().tolist() == [[0, 2], [1, 9]]
    assert documents is None
    assert RowSet(rows.rows, rows.where, 11).batch([9])[0].shape == (1, 11)


def test_samples_are_told_by_file_and_line():
    (loader,) = loaders(1)
    batch = next(loader)
    row = int(batch.tokens[0, 0, 0])
    assert loader.describe(batch.samples[0]) == f"sample 0: f, line {row}, epoch 0"


@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
def test_held_out_rows_count_once_at_any_world_size(dp_size):
    ranks = [list(eval_rows(row_set(), 2, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [int(batch[1].max()) for batches in ranks for rows, batch in batches if rows for batch in [batch]]
    assert counted
    every = [targets[targets != IGNORE].tolist() for batches in ranks for _, (_, targets, _) in batches]
    assert sorted(label for labels in every for label in labels) == list(range(13))


def test_other_data_is_refused():
    rows, other = row_set(), row_set(12)
    assert rows.fingerprint() == row_set().fingerprint() != other.fingerprint()
    with pytest.raises(
        DataError, match="trained on other data: its checkpoint has examples 'x', the files .* give 'y'"
    ):
        same_data({"samples": 5, "examples": "x"}, {"examples": "y"})
    same_data({"samples": 5, "examples": "x"}, {"examples": "x"})
    assert json.dumps({"examples": rows.fingerprint()})


# -- of a masked model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory):
    """A BERT's tokenizer, with its own template."""
    words = [
        "ada",
        "wrote",
        "to",
        "mary",
        "in",
        "london",
        "by",
        "##ron",
        "##s",
        *"abcdefghijklmnopqrstuvwxyz",
        "中",
        "文",
    ]
    vocab = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    vocab |= {f"[unused{at}]": at for at in range(len(vocab), 260)}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path_factory.mktemp("word_piece") / "t"
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_a_text_of_a_masked_model_has_its_label_at_cls(word_piece):
    ours, theirs = word_piece
    texts = ["Ada wrote to Mary", "Byrons 中文", "in"]
    task = ClassifyTask(kind="classify", labels=["a", "b"], train=["-"], too_long="cut")
    rows = encode_examples([Example(text, text, "b") for text in texts], ours, 5, task, frame_of(ours))
    assert rows.notes == ["2 of 3 texts are cut at 5 tokens"]
    for row, text in zip(rows.rows, texts, strict=True):
        assert row.tokens.tolist() == theirs(text, truncation=True, max_length=5).input_ids
        assert row.targets.tolist() == [1] + [IGNORE] * (len(row.tokens) - 1)
    tokens, targets, documents = rows.batch([2, 0])
    assert documents.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]  # nothing attends to what fills a row up
    assert (targets[0, 1:] == IGNORE).all()
    assert tokens.shape == (2, 5)


@pytest.mark.parametrize("which", ["first", "last"])
def test_words_of_a_masked_model_stand_where_transformers_has_them(word_piece, which):
    ours, theirs = word_piece
    words, tags = ["Ada", "Byrons", "中", "zzz", "\u200b", "London"], ["A", "B", "A", "B", "A", "B"]
    task = TagTask(kind="tag", labels=["A", "B"], train=["-"], word_token=which)
    rows = encode_sentences([Sentence("x", words, tags)], ours, 32, task, frame_of(ours))
    expected = theirs(words, is_split_into_words=True)
    (row,) = rows.rows
    assert row.tokens.tolist() == expected.input_ids
    of_word = expected.word_ids()
    places = [[at for at, word in enumerate(of_word) if word == number] for number in range(len(words))]
    targets = {at[0 if which == "first" else -1]: "AB".index(tag) for at, tag in zip(places, tags, strict=True) if at}
    assert {at: target for at, target in enumerate(row.targets.tolist()) if target != IGNORE} == targets
    assert rows.notes == ["1 words have no token in the run's tokenizer and are neither trained on nor scored"]


def test_words_behind_the_cut_of_a_masked_model_have_no_target(word_piece):
    ours, _ = word_piece
    task = TagTask(kind="tag", labels=["A", "B"], train=["-"], too_long="cut")
    rows = encode_sentences([Sentence("x", ["ada"] * 6, ["A"] * 6)], ours, 5, task, frame_of(ours))
    assert rows.rows[0].targets.tolist() == [IGNORE, 0, 0, 0, IGNORE]
    assert rows.rows[0].tokens[[0, -1]].tolist() == [ours.cls_id, ours.sep_id]
    assert rows.notes == ["1 of 1 sentences are cut at 5 tokens; 3 words have no target"]
    strict = task.model_copy(update={"too_long": "refuse"})
    with pytest.raises(DataError, match="the text has 8 tokens, model.seq_len=5 is the longest"):
        encode_sentences([Sentence("x", ["ada"] * 6, ["A"] * 6)], ours, 5, strict, frame_of(ours))


def test_a_tokenizer_without_a_begin_is_of_no_masked_model(byte_level):
    with pytest.raises(DataError, match="has no token that stands before a text of a masked model; name its cls_token"):
        frame_of(byte_level())
