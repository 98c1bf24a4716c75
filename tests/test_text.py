"""Tokenizers of both kinds, the chat template's text, the opening of a turn, and bad folders."""

import json
import time
from types import SimpleNamespace

import pytest
import sentencepiece
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dail_jax import text as text_lib
from dail_jax import tokenizer_worker
from dail_jax.errors import UserError
from dail_jax.text import load_tokenizer, open_tag, stop_ids

CHAT = """{%- for m in messages %}
{{- '<|start|>' + m['role'] + '\\n' + m['content'] | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
MESSAGES = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "2 + 2 = é? {{ 7*7 }}"}]


def byte_tokenizer(folder, template: str | None = CHAT, eos: str | None = "<|end|>"):
    """A tokenizer of 256 bytes and 4 control tokens, saved as tokenizer.json."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Fast(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        chat_template=template,
        additional_special_tokens=["<|start|>", "<think>", "</think>"],
    )
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def impatient():
    """Limits each text to one second of CPU time."""
    server = text_lib._Server(seconds=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lib, "_SERVER", server)
        yield
    server.worker.stop()


def test_round_trip_and_ids(tokenizer):
    text = "  Zeilen\n\n mit é, ∑ und  Leerzeichen ."
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.encode("") == []
    assert tokenizer.size == 260 and tokenizer.eos_id == tokenizer.encode("<|end|>")[0]
    ids = tokenizer.encode("a<|end|>")
    assert len(ids) == 2 and tokenizer.decode(ids) == "a" and tokenizer.decode(ids, keep_special=True) == "a<|end|>"


def test_rendering_equals_transformers(tokenizer):
    hf = AutoTokenizer.from_pretrained(tokenizer.folder)
    for messages in (MESSAGES, MESSAGES[1:]):
        theirs = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.render_text(messages) == theirs
        assert tokenizer.render(messages) == tokenizer.encode(theirs)
    assert "{{ 7*7 }}" in tokenizer.render_text(MESSAGES)  # messages are data, not templates


@pytest.mark.parametrize(
    "tail, opening, end",
    [
        ("", "", "assistant\n"),
        ("", "<think>\n", "assistant\n<think>\n"),
        ("<think>\n", "<think>\n", "assistant\n<think>\n"),
        ("<think>", "<think>\n", "assistant\n<think>\n"),
        ("<think>\n", "<think>", "assistant\n<think>\n"),
        ("<think>\n\n</think>\n\n", "<think>\n", "assistant\n<think>\n"),
        ("<think>\n\n</think>\n\n", "", "<think>\n\n</think>\n\n"),
        ("", "Answer: ", "assistant\nAnswer: "),
    ],
)
def test_the_turn_is_opened_once(tmp_path, tail, opening, end):
    template = CHAT.replace("'<|start|>assistant\\n'", f"'<|start|>assistant\\n' + {json.dumps(tail)}")
    tokenizer = load_tokenizer(byte_tokenizer(tmp_path, template))
    text = tokenizer.render_text(MESSAGES, opening)
    assert text.endswith(end) and text.count("<think>") == end.count("<think>")
    assert open_tag(opening) == ("think" if "think" in opening else None)


def test_a_template_that_prints_the_date_prints_the_same_tomorrow(tmp_path):
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    assert load_tokenizer(byte_tokenizer(tmp_path, dated)).render_text(MESSAGES) == "26 Jul 2024"


@pytest.mark.parametrize("named", [True, False])
def test_sentencepiece(tmp_path, named):
    text = [f"The answer is {i}, since {i} + {i} = {2 * i}." for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    if named:
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    sample = "The answer is 12,  since é + 7."
    assert tokenizer.encode(sample) == theirs.encode(sample)
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.size == 320 and tokenizer.eos_id == theirs.eos_id()
    assert tokenizer.render_text(MESSAGES[1:], "<think>\n").endswith("assistant\n<think>\n")


def test_stop_ids(tmp_path, tokenizer):
    assert stop_ids(tmp_path, tokenizer) == (tokenizer.eos_id,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 3]}')
    assert stop_ids(tmp_path, tokenizer) == (3, 7, 9, tokenizer.eos_id)
    (tmp_path / "config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UserError, match=r"config.json:eos_token_id: got 'x', want a token id"):
        stop_ids(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: got a file that is not JSON"):
        stop_ids(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "template, complaint",
    [
        ("a\nb\n{% if %}", r"line 3:chat_template: .*TemplateSyntaxError"),
        ("{{ 1 }}\n{{ messages[0].a.b }}", r"line 2:chat_template: .*UndefinedError"),
        ("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"did not end within 1 sec"),
        ("{{ 'x' * 10**10 }}", r"out of memory"),
        ("{{ 'xxxxxxxxxx' * 10**6 }}", r"megabyte"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", r"SecurityError"),
        (r"{{ '\ud800' }}", r"chat_template: .*it writes half of a surrogate pair \(U\+D800\), want whole characters"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_bad_templates_are_found_before_use(tmp_path, template, complaint):
    start = time.monotonic()
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(byte_tokenizer(tmp_path, template))
    assert time.monotonic() - start < 60


def test_half_of_a_surrogate_pair_in_a_folder_is_one_line(tmp_path):
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for change, complaint in (
        ({"chat_template": "\ud800{{ messages[0].content }}"}, r":chat_template: got a chat template that fails: "),
        ({"eos_token": "<\udfff>"}, ": got a tokenizer that does not load: "),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=r"\A(?!.*\n).*" + complaint + ".*surrogate"):
            load_tokenizer(tmp_path)


@pytest.mark.usefixtures("impatient")
def test_templates_that_are_slow_only_for_real_messages(tmp_path):
    """Every prompt is limited as in the trial at the start; after a failure, the next prompt works again."""
    loop = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = load_tokenizer(
        byte_tokenizer(
            tmp_path,
            "{% set text = messages[-1].content %}{% if 'slow' in text %}" + loop + "{% endif %}"
            "{% if 'large' in text %}{{ 'x' * 2000000 }}{% endif %}{% if 'huge' in text %}{{ 'x' * 10**10 }}{% endif %}"
            "{{ text }} {{ strftime_now('%Y-%m-%d %H:%M') }} {{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}",
        )
    )
    text = tokenizer.render_text([{"role": "user", "content": "fine"}])
    assert text.startswith("fine 2024-07-26 00:00 ")  # whatever today's date is
    for word, complaint in (
        ("slow", "it did not end within 1 seconds of CPU time"),
        ("large", "it turns 5 characters into 2,000,0.., over a megabyte more"),
        ("huge", r"it ran out of memory \(2048 MiB\)"),
    ):
        with pytest.raises(UserError, match=f"{tmp_path}:.*chat_template: got a chat template that fails: {complaint}"):
            tokenizer.render([{"role": "user", "content": word}])
        assert tokenizer.render_text([{"role": "user", "content": "fine"}]) == text


def hostile_tokenizer(folder, change):
    """A byte tokenizer after `change` has edited its tokenizer.json."""
    byte_tokenizer(folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    change(tree)
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return load_tokenizer(folder)


@pytest.mark.usefixtures("impatient")
def test_a_tokenizer_that_grows_without_bound(tmp_path):
    """Forty normalizers double each q; none of the texts tried at the start contains one."""
    double = {"type": "Replace", "pattern": {"String": "q"}, "content": "qq"}
    tokenizer = hostile_tokenizer(
        tmp_path, lambda tree: tree.update(normalizer={"type": "Sequence", "normalizers": [double] * 40})
    )
    assert len(tokenizer.encode("fine")) == 4
    with pytest.raises(
        UserError, match=r"got a tokenizer that fails: it (ran out of memory|did not end|turns)"
    ) as error:
        tokenizer.encode("quiet")
    assert "\n" not in str(error.value)
    assert len(tokenizer.encode("fine")) == 4


def test_a_tokenizer_whose_pattern_panics(tmp_path):
    pattern = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = hostile_tokenizer(
        tmp_path, lambda tree: tree.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [pattern]})
    )
    assert tokenizer.encode("b") != []
    with pytest.raises(UserError, match=r"got a tokenizer that fails: .*(PanicException|limit|did not end)") as error:
        tokenizer.encode("a" * 200 + "b")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_worker_that_was_killed_is_replaced_unnoticed(tokenizer):
    ids = tokenizer.encode("fine")
    process = text_lib._SERVER.worker.process
    process.kill()
    process.wait()
    assert tokenizer.encode("fine") == ids and text_lib._SERVER.worker.process.pid != process.pid


@pytest.mark.parametrize("characters", [1_000_000, 100])
def test_many_texts_are_few_messages(tokenizer, monkeypatch, characters):
    texts = [f"text {i} é" * (i % 3) for i in range(10)] + ["x" * 120]
    ids = [tokenizer.encode(text) for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.render(chat, "<think>\n") for chat in chats]
    sizes, ask = [], text_lib._SERVER.ask
    monkeypatch.setattr(text_lib._SERVER, "ask", lambda *a: sizes.append(len(a[-1]["each"])) or ask(*a))
    monkeypatch.setattr(text_lib, "MESSAGE_TEXTS", 8)
    monkeypatch.setattr(text_lib, "MESSAGE_CHARACTERS", characters)
    assert tokenizer.encode_all(texts) == ids and tokenizer.render_all(chats, "<think>\n") == prompts
    assert tokenizer.encode_all([]) == tokenizer.render_all([]) == []
    assert sizes == 2 * ([8, 3] if characters > 100 else [8, 2, 1])


def test_each_text_of_a_message_has_its_own_time(monkeypatch):
    allowed = []
    monkeypatch.setattr(tokenizer_worker, "allow", allowed.append)
    monkeypatch.setitem(tokenizer_worker.LOADED, 0, SimpleNamespace(encode=lambda text, _: [len(text)]))
    each = [{"text": "x" * n, "marked": False} for n in (3, 1, 2)]
    assert tokenizer_worker.answer({"do": "encode", "key": 0, "each": each}, 5.0) == {"ok": [[3], [1], [2]]}
    assert allowed == [5.0] * 3


def test_marked_control_tokens_are_text_between_those_that_are_not(tmp_path):
    """Covers a merge inside a token's text, a token that absorbs blanks, and one formed by breaking another."""

    def change(tree):
        tree["model"]["vocab"]["<|"] = 300
        tree["model"]["merges"] = [["<", "|"]]
        for token in tree["added_tokens"]:
            token["rstrip"] = token["content"] == "<|end|>"

    tokenizer = hostile_tokenizer(tmp_path, change)
    end, start = tokenizer.encode("<|end|>")[0], tokenizer.encode("<|start|>")[0]
    assert {"<|end|>", "<|start|>", "<think>", "</think>"} <= set(tokenizer.controls)
    text = "a<|end|> <|<|end|>end|>\ufdd0\ufdd0"
    marked, found = tokenizer.mark(text)
    assert found == ["<|end|>", "<|end|>"]
    ids = tokenizer.encode(f"<|start|>{marked}<|end|>  x", marked=True)
    assert ids[0] == start and ids.count(end) == 1
    assert ids.count(300) == text.count("<|") == 3  # merged across the mark, as in any text
    assert ids[-2:] == [end, tokenizer.encode("x")[0]]  # and the real token absorbs the blanks after it
    assert tokenizer.decode(ids[1:-2], keep_special=True) == text
    assert tokenizer.mark("plain") == ("plain", [])
    assert tokenizer.encode(tokenizer.mark("\ufdd0", keep=True)[0], marked=True) == tokenizer.encode("\ufdd0")


def test_templates_that_refuse_a_role_or_are_missing(tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}ok"
    tokenizer = load_tokenizer(byte_tokenizer(tmp_path / "a", refusing))
    assert tokenizer.render_text(MESSAGES[1:]) == "ok"
    with pytest.raises(UserError, match=r"line 1:chat_template: .*no system here"):
        tokenizer.render_text(MESSAGES)
    bare = load_tokenizer(byte_tokenizer(tmp_path / "b", None, eos=None))
    with pytest.raises(UserError, match="got no chat template"):
        bare.render(MESSAGES)
    with pytest.raises(UserError, match="without an end-of-sequence token"):
        _ = bare.eos_id
    with pytest.raises(UserError, match="without an end-of-sequence token"):
        stop_ids(tmp_path, bare)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"no such folder, want one with a tokenizer$"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="Download it: hf download Qwen/Qwen3-8B --local-dir DIR"):
        load_tokenizer("Qwen/Qwen3-8B")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer file, want tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path / "empty")
    for content, complaint in (
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-LFS pointer"),
        ("<!DOCTYPE html><html>Not found", "HTML page"),
        ('{"version": "1.0", "model": {"type": "BPE", "voc', "does not load"),
        ("", "does not load"),
    ):
        folder = byte_tokenizer(tmp_path / f"f{len(content)}")
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=complaint):
            load_tokenizer(folder)


def test_code_in_the_folder_never_runs(tmp_path):
    byte_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    try:
        assert load_tokenizer(tmp_path).encode("a")  # a plain tokenizer.json is enough by itself
    except UserError as error:
        assert "does not load" in str(error)
    assert not (tmp_path / "ran").exists()
