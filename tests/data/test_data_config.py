"""The data section: defaults, and values that are refused at the door."""

import pytest
from pydantic import ValidationError

from data.config import DataConfig
from data.sources import EmbeddedConfig, TextConfig


def test_defaults_and_dump_come_back():
    cfg = DataConfig()
    assert cfg.sources == [EmbeddedConfig()]
    assert DataConfig(**cfg.model_dump()) == cfg
    text = DataConfig(sources=[{"kind": "text", "paths": ["a.txt"]}], tokenizer={"vocab_size": 4096})
    assert isinstance(text.sources[0], TextConfig)
    assert DataConfig.model_validate(text.model_dump(mode="json")) == text


@pytest.mark.parametrize(
    "values",
    [
        {"corpus": 3},
        {"shard_bytes": 0},
        {"shard_bytes": 2.0**20},
        {"valid_fraction": -0.1},
        {"valid_fraction": 1.0},
        {"valid_fraction": float("nan")},
        {"valid_fraction": True},
        {"valid_fraction": "0.1"},
        {"seed": -1},
        {"seed": 2**63},
        {"workers": 0},
        {"workers": True},
        {"tokeniser": {}},
        {"sources": []},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"shuffle_shards": 0},
        {"packing": "first_fit"},
        {"on_bad": "ignore"},
        {"max_document_bytes": 0},
    ],
)
def test_refusals(values):
    with pytest.raises(ValidationError):
        DataConfig(**values)


def text(name, **more):
    return {"kind": "text", "paths": ["-"], "name": name, **more}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"sources": [text("a"), text("a")]}, "data.sources has 'a' 2 times; give each a name of its own"),
        ({"sources": [{"kind": "embedded"}, text("embedded")]}, "data.sources has 'embedded' 2 times"),
        ({"sources": [text("a", weight=1.0), text("b")]}, "b have no weight and others have; give all of them one, or"),
        (
            {"sources": [text("a")], "stages": [{"from_tokens": 9, "weights": {"c": 1.0}}]},
            r"weights of c, which data.sources does not have; it has \['a'\]",
        ),
        (
            {"sources": [text("a")], "stages": [{"from_tokens": n, "weights": {"a": 1.0}} for n in (9, 9)]},
            "from_tokens=9 after 9; expected ascending numbers",
        ),
        ({"skip": [{}]}, "needs exactly one of: steps"),
        ({"skip": [{"steps": [1, 2], "samples": [1, 2]}]}, "needs exactly one of: steps"),
        ({"skip": [{"source": "a", "documents": [1, 2]}]}, "needs exactly one of: steps"),
        ({"skip": [{"steps": [0, 2]}]}, r"\(0, 2\) is no stretch; expected \[first, last\] with 1 <= first <= last"),
        ({"skip": [{"samples": [3, 10**20]}]}, r"data.skip ends at 10{20}; expected at most 10{15}"),
        ({"skip": [{"samples": [3, 2]}]}, r"\(3, 2\) is no stretch; expected \[first, last\] with 0 <= first <= last"),
    ],
)
def test_what_does_not_fit_together_is_explained(values, match):
    with pytest.raises(ValidationError, match=match):
        DataConfig.model_validate(values)


SECRETS = [
    {"corpus": "https://me:hunter2@host/corpus"},
    {"corpus": "https://host/corpus?X-Amz-Signature=hunter2"},
    {"sources": [{"kind": "text", "paths": ["a.txt", "s3://AKIA:hunter2@bucket/*"]}]},
    {"sources": [{"kind": "text", "paths": "s3://AKIA:hunter2@bucket/*"}]},  # no list
    {"sources": [{"kind": "texts", "paths": ["s3://AKIA:hunter2@bucket/*"]}]},  # no such kind
    {
        "sources": [
            {"kind": "text", "paths": ["s3://b/a"], "storage_options": {"endpoint_url": "http://me:hunter2@host"}}
        ]
    },
    {"sources": [{"kind": "dataset", "path": "https://hunter2@host/x", "field": "text"}]},
    {"sources": [{"kind": "corpus", "path": "https://host/corpus?sig=hunter2"}]},
    {"sources": [{"kind": "megatron", "prefix": ["https://host/a.bin?token=hunter2"]}]},
    {"tokenizer": {"path": "https://me:hunter2@host/tokenizer"}},
    {"cache": {"folder": "ftp://me:hunter2@host/cache"}},
    {"cache": {"options": {"endpoint_url": "https://me:hunter2@host"}}},
    {"stream": {"dataset": "json", "data_files": ["https://host/a?key=hunter2"], "tokenizer": "t"}},
    {"stream": {"dataset": "https://me:hunter2@host/x", "tokenizer": "t"}},
    {"stream": {"dataset": "json", "data_files": ["a"], "tokenizer": "https://host/t?password=hunter2"}},
]


@pytest.mark.parametrize("values", SECRETS)
@pytest.mark.fault(53)
def test_urls_with_credentials_are_refused_by_name_alone(values):
    with pytest.raises(
        ValidationError, match=r"data\.[a-z_.0-9]+ is a URL with .*would be saved with the run; give"
    ) as caught:
        DataConfig.model_validate(values)
    assert [error["type"] for error in caught.value.errors()] == ["value_error"]
    assert "hunter2" not in caught.value.errors()[0]["msg"]
    name = caught.value.errors()[0]["msg"].split()[2].removeprefix("data.").split(".")
    for step in name:
        values = values[int(step) if step.isdigit() else step]
    assert "hunter2" in values


def test_a_source_that_is_made_already_is_looked_at_too():
    with pytest.raises(ValidationError, match=r"data\.sources\.0\.paths\.0 is a URL with key in its query"):
        DataConfig(sources=[TextConfig(paths=["https://host/a?key=hunter2"])])


def test_other_urls_are_taken():
    paths = ["https://host/a.txt?download=true", "hf://datasets/me/poems@main/a.txt", "/data/me:you@there/a?key=b"]
    assert DataConfig(corpus="s3://bucket/c", sources=[{"kind": "text", "paths": paths}]).sources[0].paths == paths


def test_sections_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().seed = 3
