"""Conversations become rows in which only answers are to be predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.config import parse_config
from cluster.errors import ConfigError, InputError
from cluster.processing.chat_template import render_chat
from cluster.processing.text import TextProcessor
from jobs.data.catalog import DatasetCatalog
from jobs.data.chat import ChatEncoder
from jobs.data.config import DataConfig, ExistingTokenizer
from jobs.data.dataset import DOCUMENT_STARTS, LOSS_MASK, TOKENS, Dataset
from jobs.data.inspection import expected_vocab_size
from jobs.data.packing import ChatPacker
from jobs.data.tokenizer_files import read_tokenizer
from jobs.data.tokenizing import train_bpe

PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}"
    "{{ message.content }}{{ eos_token }}{% endgeneration %}{% else %}Q:{{ message.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
REWRITING = "{{ messages | length }}" + PLAIN
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is 阳?"},
    {"role": "assistant", "content": "Above."},
    {"role": "user", "content": "Now?"},
    {"role": "assistant", "content": "Still."},
]


def make_tokenizer(directory: Path, template: str = PLAIN, **settings: Any) -> Path:
    files = train_bpe(["where is the sun? above the assistant"], vocab_size=300)
    files.write(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.update(settings)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def make_encoder(directory: Path, template: str) -> ChatEncoder:
    make_tokenizer(directory, template)
    return ChatEncoder(read_tokenizer(ExistingTokenizer(kind="existing", path=str(directory))))


def config_of(tmp_path: Path, talks: list[Any], **text: Any) -> DataConfig:
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    )
    tokenizer = {"kind": "existing", "path": str(tmp_path / "tokenizer")}
    return DataConfig(
        name="talks",
        source={"kind": "chat", "paths": [str(tmp_path / "chat.jsonl")]},
        splits={"validation": 0.2, "test": 0},
        text={"tokenizer": tokenizer, "sequence_length": 63, **text},
    )


def bits(dataset: Dataset, name: str) -> Any:
    rows = dataset.rows("train")
    size = dataset.text.sequence_length + 1
    return np.unpackbits(rows.read(np.arange(len(rows)))[name], axis=1, count=size).astype(bool)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (PLAIN, ["Above.<|endoftext|>\n", "Still.<|endoftext|>\n"]),
        (MARKED, ["Above.<|endoftext|>", "Still.<|endoftext|>"]),
    ],
)
def test_only_answers_are_to_be_predicted(
    tmp_path: Path, template: str, answers: list[str]
) -> None:
    ids, mask = make_encoder(tmp_path / "t", template).encode(TALK, lambda: "a:1")
    tokenizer = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    found = [tokenizer.decode(ids[run].tolist(), skip_special_tokens=False) for run in runs]
    assert [text for text, run in zip(found, runs, strict=True) if mask[run[0]]] == answers


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_tokens_are_those_of_serving(tmp_path: Path, template: str) -> None:
    talk = [{"role": "user", "content": "a<|endoftext|>b 阳"}, *TALK[2:3]]
    ids, _ = make_encoder(tmp_path / "t", template).encode(talk, lambda: "a:1")
    question = TextProcessor.load(tmp_path / "t").encode_chat(talk[:1])
    assert ids[: len(question)].tolist() == question
    assert ids.tolist().count(0) == 1


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ids, mask = make_encoder(tmp_path / "t", MARKED).encode(TALK, lambda: "a:1")
    reference = AutoTokenizer.from_pretrained(tmp_path / "t").apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == reference["input_ids"]
    assert mask.astype(int).tolist() == reference["assistant_masks"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "t", REWRITING)
    with pytest.raises(InputError, match=r"'a:7': the chat template writes the turns .*generation"):
        encoder.encode(TALK, lambda: "a:7")


@pytest.mark.parametrize(
    ("template", "content", "text", "reason"),
    [
        (PLAIN, "", {}, "no answer 60"),
        ("{{ messages[0].content }}", "yes", {}, "no answer 60"),
        (PLAIN, "yes " * 99, {"long_conversations": "drop"}, "too many tokens 60"),
    ],
)
def test_when_nothing_of_the_conversations_is_left_the_reason_is_said(
    catalog: DatasetCatalog,
    tmp_path: Path,
    template: str,
    content: str,
    text: dict[str, Any],
    reason: str,
) -> None:
    make_tokenizer(tmp_path / "tokenizer", template)
    answer = [{"role": "assistant", "content": content}] if content else []
    talks = [[{"role": "user", "content": f"say {n}"}, *answer] for n in range(60)]
    with pytest.raises(InputError, match=rf"'train' holds no conversation: .*\({reason}\)"):
        catalog.ensure(config_of(tmp_path, talks, **text))


def read(directory: Path, **values: Any) -> ChatEncoder:
    config = ExistingTokenizer(kind="existing", path=str(directory), **values)
    return ChatEncoder(read_tokenizer(config))


def test_a_template_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t")
    latin = "{{ 'é' }}".encode("latin-1")
    (tmp_path / "mine.jinja").write_bytes(latin)
    with pytest.raises(InputError, match=r"mine\.jinja' is not UTF-8 text \(byte 4\)"):
        read(directory, chat_template=str(tmp_path / "mine.jinja"))
    (directory / "chat_template.jinja").write_bytes(latin)
    with pytest.raises(InputError, match=r"t/chat_template\.jinja' is not UTF-8 text \(byte 4\)"):
        read(directory)


def test_a_configuration_that_holds_no_template_or_no_object_is_one_line(tmp_path: Path) -> None:
    directory = make_tokenizer(tmp_path / "t", "", chat_template=["a", "b"])
    with pytest.raises(InputError, match=r"'.*t' has no chat template"):
        read(directory)
    (directory / "tokenizer_config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"tokenizer_config\.json that is no JSON object"):
        read(directory)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\\nsystem turn') }}", "no system turn"),
        ("{{ 'x' * 10000000000 }}", r"'\*' makes more than 10,000,000 characters"),
        ("{{ 10000000000 * ['x'] }}", r"'\*' makes more than 10,000,000 characters"),
        ("{{ 9 ** 99999999 }}", r"'\*\*' makes more than 10,000,000 characters"),
        (
            "{% set all = range(99999) %}{% macro m() %}{% for a in all %}{% for b in all %}"
            "{% endfor %}{% endfor %}{% endmacro %}{{ m() }}",
            "its loops take more than 1,000,000 steps",
        ),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
        ("{% for", "unexpected 'end of template'"),
    ],
)
def test_a_template_is_stopped_in_one_line(tmp_path: Path, template: str, reason: str) -> None:
    encoder = make_encoder(tmp_path / "t", template)
    with pytest.raises(InputError, match=rf"'a:7': the chat .* conversation: {reason}") as caught:
        encoder.encode(TALK, lambda: "a:7")
    assert "\n" not in str(caught.value)


LOOPS = (
    "{% if tools is not none %}TOOLS{% endif %}{% set ns = namespace(n=0) %}"
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}"
    "{% if loop.last %}!{% endif %}{{ loop.previtem.role if not loop.first }}"
    "{% set ns.n = ns.n + 2 * 3 %}{% if ns.n > 12 %}{% break %}{% endif %}{% endfor %}"
    "{% for k, v in messages[0].items() %}{{ k ~ '-' * 3 ~ v | tojson }}{% endfor %}"
    "{{ ns.n ** 2 }}{{ messages[1:] | tojson(indent=1) }}"
)


@pytest.mark.parametrize("template", [PLAIN, MARKED, LOOPS])
def test_templates_write_as_those_of_transformers(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), spans = render_jinja_template(
        [TALK],
        chat_template=template,
        return_assistant_tokens_mask=template == MARKED,
        eos_token="",
    )
    found = render_chat(template, TALK, add_generation_prompt=False, eos_token="")
    assert found == (expected, [tuple(span) for span in spans[0]] if spans else [])


@given(lengths=st.lists(st.integers(1, 9), max_size=300), size=st.integers(9, 20))
def test_conversations_are_packed_whole_and_none_is_lost(lengths: list[int], size: int) -> None:
    packer = ChatPacker(size - 1, np.uint16, pad_id=0)
    tokens = np.concatenate([np.zeros(0, int), *(np.full(n, i + 1) for i, n in enumerate(lengths))])
    added = packer.add(tokens, np.ones(len(tokens), np.uint8), np.array(lengths, dtype=np.int64))
    last = packer.finish()
    rows = np.concatenate([added[TOKENS], last[TOKENS]])
    mask, starts = (
        np.unpackbits(np.concatenate([added[name], last[name]]), axis=1, count=size).astype(bool)
        for name in (LOSS_MASK, DOCUMENT_STARTS)
    )
    assert sorted(rows[rows > 0]) == sorted(tokens)
    assert np.array_equal(mask, rows > 0)
    changes = np.diff(rows.astype(int), axis=1, prepend=-1) != 0
    assert np.array_equal(starts, changes)
    if lengths:
        assert len(rows) <= 2 * -(-sum(lengths) // size) + 64


def test_a_dataset_of_conversations(catalog: DatasetCatalog, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    talks = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
        for n in range(50)
    ]
    unanswered = [{"role": "user", "content": "hello?"}]
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 99}]
    config = config_of(tmp_path, [*talks, talks[0], unanswered, long])
    dataset, _ = catalog.ensure(config)
    text = dataset.text
    assert (text.has_loss_mask, text.num_read) == (True, 53)
    assert text.left_out == {"duplicate": 1, "no_answer": 1}
    assert text.num_cut == 1
    assert sum(text.num_documents.values()) == 51
    tokens = dataset.rows("train").read(np.arange(dataset.info.num_rows["train"]))[TOKENS]
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    learnt = tokenizer.decode(tokens[bits(dataset, LOSS_MASK)].tolist())
    answers = learnt.replace("<|endoftext|>", "").split("\n")
    assert len(answers) == text.num_documents["train"]
    assert {answer[0] for answer in answers if answer} <= {"a", "l"}
    names = {path.name for path in dataset.tokenizer_dir.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    dropped, _ = catalog.ensure(config_of(tmp_path, [*talks, long], long_conversations="drop"))
    assert dropped.text.left_out == {"too_many_tokens": 1}


@pytest.mark.parametrize(
    ("settings", "template", "message"),
    [
        ({}, "", "has no chat template; give one with data.text.tokenizer.chat_template=FILE "),
        ({"auto_map": {"AutoTokenizer": "code.Mine"}}, PLAIN, "asks for code of its own"),
        ({"eos_token": None}, PLAIN, "names no eos_token"),
    ],
)
def test_a_tokenizer_that_will_not_do_is_refused(
    catalog: DatasetCatalog, tmp_path: Path, settings: dict[str, Any], template: str, message: str
) -> None:
    make_tokenizer(tmp_path / "tokenizer", template, **settings)
    with pytest.raises(InputError, match=message):
        catalog.ensure(config_of(tmp_path, [TALK, TALK[1:3], TALK[3:]]))


def test_a_look_at_the_vocabulary_already_refuses_a_tokenizer_without_a_template(
    tmp_path: Path,
) -> None:
    make_tokenizer(tmp_path / "tokenizer", "")
    config = config_of(tmp_path, [TALK, TALK[1:3], TALK[3:]])
    with pytest.raises(InputError, match=r"\(jobs/data/plain_chat\.jinja is a plain one\)"):
        expected_vocab_size(config)


def test_a_directory_without_a_tokenizer_is_refused(
    catalog: DatasetCatalog, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"tokenizer' has no tokenizer\.json"):
        catalog.ensure(config_of(tmp_path, [TALK]))


def test_another_template_is_kept_with_the_tokenizer(
    catalog: DatasetCatalog, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "tokenizer", "")
    (tmp_path / "mine.jinja").write_text(MARKED)
    talks = [[*TALK[:1], {"role": "user", "content": f"q{n}"}, TALK[2]] for n in range(20)]
    config = config_of(tmp_path, talks)
    tokenizer = {**config.text.tokenizer.model_dump(), "chat_template": f"{tmp_path}/mine.jinja"}
    values = config.model_dump()
    values["text"]["tokenizer"] = tokenizer
    dataset, _ = catalog.ensure(DataConfig.model_validate(values))
    assert (dataset.tokenizer_dir / "chat_template.jinja").read_text() == MARKED
    assert dataset.text.chat_template_sha256


def test_conversations_need_a_tokenizer_with_a_template() -> None:
    values = {"name": "x", "source": {"kind": "chat", "paths": ["a.jsonl"]}}
    with pytest.raises(ConfigError, match=r"conversations need text\.tokenizer of kind 'existing'"):
        parse_config(values, DataConfig, source="chat.yaml")
