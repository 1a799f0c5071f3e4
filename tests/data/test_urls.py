"""What of a URL lets its reader in: found where it is, not seen where it is not, and never shown."""

import pytest

from data.urls import leaves, redact, secret_in, secret_options

SIGNED = (
    "https://b.s3.amazonaws.com/a?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2Fus&X-Amz-Expires=600"
    "&X-Amz-Security-Token=x&X-Amz-Signature=hunter2"
)
LOGIN = "a user or password in it"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://me:hunter2@host/x", LOGIN),
        ("https://hunter2@host/x", LOGIN),
        ("ftp://me:hunter2@host/x", LOGIN),
        ("s3://AKIA:hun/ter/2@bucket/x", LOGIN),
        ("s3://AKIA:1234@bucket", LOGIN),
        ("s3://me%3Ahunter2%40bucket/x", LOGIN),
        ("zip://a.txt::https://me:hunter2@host/a.zip", LOGIN),
        ("s3+http://me:hunter2@host:9000/x", LOGIN),
        (SIGNED, "X-Amz-Credential, X-Amz-Security-Token, X-Amz-Signature in its query"),
        ("https://s/a?Expires=1&AWSAccessKeyId=A&Signature=hunter2", "AWSAccessKeyId, Signature in its query"),
        ("https://s/a?sv=1&sp=r&sig=hunter2", "sig in its query"),
        ("https://s/a?download=true&token=hunter2", "token in its query"),
        ("https://s/a?x-goog-signature=hunter2", "x-goog-signature in its query"),
        ("https://s/a?key=hunter2", "key in its query"),
        ("https://s/a?api_key=hunter2", "api_key in its query"),
        ("https://s/a?apikey=hunter2", "apikey in its query"),
        ("https://s/a?client_secret=hunter2", "client_secret in its query"),
        ("https://s/a?pass%77ord=hunter2", "password in its query"),
        ("https://s/a#access_token=hunter2", "access_token in its query"),
        ("https://s/a?credential=hunter2", "credential in its query"),
    ],
)
def test_what_lets_in_is_found_and_not_shown(url, found):
    assert secret_in(url) == found
    assert "hunter2" not in redact(f"cannot read {url!r}: it is not there")


@pytest.mark.parametrize(
    "url",
    [
        "https://huggingface.co/datasets/a/b/resolve/main/c.jsonl?download=true",
        "https://host:8443/a?download=true&keyword=cat&page=2",
        "http://127.0.0.1:9000/bucket/me@home/a.txt",
        "s3://bucket/token=a/key=b/*.jsonl",
        "s3://bucket/part-?/token=a/x",
        "hf://datasets/me/poems@main/a.parquet",
        "abfs://container@account.dfs.core.windows.net/a",
        "sftp://me@host/a",
        "file:///home/me:you@there/a",
        "/data/me:you@there/a?token=b",
        "C:\\texts",
        "",
    ],
)
def test_other_urls_are_let_pass(url):
    assert secret_in(url) == ""


def test_options():
    options = {"anon": True, "token": "anon", "client_kwargs": {"endpoint_url": "http://h", "password": 7}, "sas": "x"}
    assert secret_options(options) == ["client_kwargs.password", "sas"]
    assert secret_options({"token": False, "key": None, "cache_type": "none", "monkeys": 3}) == []


def test_leaves():
    assert list(leaves({"a": [{"b": 1}, 2], "c": {}, "d": (3,)})) == [("a.0.b", 1), ("a.1", 2), ("d.0", 3)]


def test_redact_leaves_text_alone():
    text = "data.corpuss: no such key; did you mean data.corpus? It has no s3://bucket/a, s3://b at 3=3"
    assert redact(text) == text
    assert redact("me and hunter2", ["hunter2"]) == "me and ***"
