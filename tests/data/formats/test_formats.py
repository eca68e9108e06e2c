"""Preprocessing formats: exact ids and labels, what they share, and what they refuse."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ITALIAN, turns

from llava.constants import IGNORE_INDEX, VISUAL_TOKENS
from llava.data.dataset import SupervisedDataset, find_unsupervised
from llava.data.formats import FORMATS, build_format
from llava.data.formats.base import ContextError, label_segments, truncate_segments
from llava.data.formats.templates import TEMPLATES, Template, register_template
from llava.data.module import make_supervised_data_module
from llava.data.placeholders import expand_placeholders, placeholder_kinds
from llava.data.records import read_records
from llava.train.arguments import DataArguments
from llava.types import Media, Record, Turn

GOLDEN = Path(__file__).parent / "golden"
SPAN = "<im_start><im_patch><im_end>"
CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>",
]  # fmt: skip

# The templates that Qwen2, Llama 3, Gemma and Llama 2 come with, as their model cards describe what they write.
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role)"
    " + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def conversation(*texts: str, system: str | None = None) -> list[Turn]:
    opening = [] if system is None else [Turn("system", system)]
    return opening + [Turn("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


TWO_TURNS = conversation(f"{SPAN}\nUn uomo", "una ragazza", "il gatto", "il cane")
CONVERSATIONS = [
    conversation("<image>\nUn uomo", "una ragazza", "il gatto", "il cane"),
    conversation("ciao", " una stella \n"),
    conversation("", "il gatto"),
    conversation("<video>", "una stella"),
    conversation("prima <image> dopo <image>", "", "e?", "il cane<image>"),
    conversation("ciao", "il gatto", "e poi?"),
    conversation("Chi sei?", "un cane", system="Sei un cane."),
    conversation("<|im_end|> <end_of_turn>\n", "a<|eot_id|>b [INST] <|im_start|>assistant\n"),
]


@pytest.fixture(scope="module")
def gpt2_tokenizer(tokenizer_dir):
    """GPT-2's kind: nothing begins a text, and one token begins and ends all."""
    return _complete(_load(tokenizer_dir))


@pytest.fixture(scope="module")
def llama3_tokenizer(tokenizer_dir):
    """Llama 3's kind: byte-level, and every text begins with a token of its own."""
    tokenizer = _load(tokenizer_dir)
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    return _complete(_begin(tokenizer))


@pytest.fixture(scope="module")
def llama2_tokenizer():
    """Llama 2's kind: SentencePiece's space before every text, bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(ITALIAN * 4, trainer)
    state = json.loads(bpe.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>",
    )  # fmt: skip
    return _complete(_begin(tokenizer))


def _load(folder):
    from llava.model.vocabulary import load_tokenizer

    return load_tokenizer(str(folder))


def _begin(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A $B", special_tokens=[begin]
    )
    return tokenizer


def _complete(tokenizer):
    """Add the visual tokens, every format's control tokens (two of them not declared special) and a template."""
    from tokenizers import AddedToken

    from llava.model.vocabulary import add_visual_tokens

    add_visual_tokens(tokenizer)
    for token in CONTROL:
        special = not token.endswith("of_turn>")
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(params=["gpt2", "llama2", "llama3"])
def any_tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture
def templated(llama3_tokenizer, gpt2_tokenizer, llama2_tokenizer):
    """A function that puts a chat template into a tokenizer until the test is over."""
    tokenizers = {"llama3": llama3_tokenizer, "gpt2": gpt2_tokenizer, "llama2": llama2_tokenizer}

    def put(template, kind="llama3"):
        tokenizers[kind].chat_template = template
        return tokenizers[kind]

    yield put
    for tokenizer in tokenizers.values():
        tokenizer.chat_template = CHATML


def encode(name, tokenizer, conversation):
    return label_segments(build_format(name, tokenizer).encode(conversation))


def prompt_ids(name, tokenizer, conversation):
    return [i for segment in build_format(name, tokenizer).encode_prompt(conversation) for i in segment.ids]


def describe(tokenizer, ids, labels):
    """Runs of learned and of given positions, a line each: ids and their text."""
    runs: list[tuple[str, list[int]]] = []
    for i, label in zip(ids, labels, strict=True):
        assert label in (i, IGNORE_INDEX)
        state = "given" if label == IGNORE_INDEX else "learned"
        if not runs or runs[-1][0] != state:
            runs.append((state, []))
        runs[-1][1].append(i)
    return "".join(f"{state}\t{' '.join(map(str, run))}\t{tokenizer.decode(run)!r}\n" for state, run in runs)


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_golden_ids_and_labels_of_named_templates(name, kind, request):
    tokenizer = request.getfixturevalue(f"{kind}_tokenizer")
    golden = (GOLDEN / f"{name}_{kind}.tsv").read_text(encoding="utf-8")
    assert describe(tokenizer, *encode(name, tokenizer, TWO_TURNS)) == golden


@pytest.mark.parametrize(
    ("name", "kind", "template"),
    [
        ("chatml", "gpt2", CHATML),
        ("llama_3", "llama3", LLAMA_3),
        ("gemma", "llama3", GEMMA),
        ("llama_2", "llama2", LLAMA_2),
    ],
)
def test_golden_ids_and_labels_of_chat_templates(templated, name, kind, template):
    tokenizer = templated(template, kind)
    golden = (GOLDEN / f"chat_{name}_{kind}.tsv").read_text(encoding="utf-8")
    assert describe(tokenizer, *encode("chat", tokenizer, TWO_TURNS)) == golden


V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
WHOLE_TEXTS = {
    "plain": "il gatto\nil cane\n{e}",
    "v1": f"{V1_SYSTEM} USER: Un uomo ASSISTANT: il gatto{{e}}USER: e poi? ASSISTANT: il cane{{e}}",
    "llama_2": f"[INST] <<SYS>>\n{VISION_SYSTEM}\n<</SYS>>\n\nUn uomo [/INST] il gatto {{e}}"
    "{b}[INST] e poi? [/INST] il cane {e}",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nUn uomo<|im_end|>\n"
    "<|im_start|>assistant\nil gatto<|im_end|>\n<|im_start|>user\ne poi?<|im_end|>\n"
    "<|im_start|>assistant\nil cane<|im_end|>{e}",
}


@pytest.mark.parametrize("name", sorted(WHOLE_TEXTS))
def test_pieces_read_as_one_text(name, any_tokenizer):
    begin = "" if any_tokenizer.bos_token_id == any_tokenizer.eos_token_id else any_tokenizer.bos_token
    text = WHOLE_TEXTS[name].replace("{b}", begin).replace("{e}", any_tokenizer.eos_token)
    whole = any_tokenizer(text)["input_ids"]
    assert encode(name, any_tokenizer, conversation("Un uomo", "il gatto", "e poi?", "il cane"))[0] == whole


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2"])
@pytest.mark.parametrize("template", [CHATML, LLAMA_3, GEMMA, LLAMA_2], ids=["chatml", "llama_3", "gemma", "llama_2"])
def test_chat_equals_what_transformers_makes_of_the_template(templated, template, kind):
    tokenizer = templated(template, kind)
    texts = ("Un uomo", "il gatto", "e poi?", "il cane")
    ids, _ = encode("chat", tokenizer, conversation(*texts))
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation(*texts)]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    expected = expected[:-1] if expected[-1] == newline else expected
    expected = expected if expected[-1] == tokenizer.eos_token_id else [*expected, tokenizer.eos_token_id]
    begin = [] if tokenizer.bos_token_id == tokenizer.eos_token_id else [tokenizer.bos_token_id]
    assert ids == (expected if expected[:1] == begin else begin + expected)
    asked = tokenizer.apply_chat_template(
        messages[:3], tokenize=True, add_generation_prompt=True, return_dict=False
    )  # fmt: skip
    prompt = prompt_ids("chat", tokenizer, conversation(*texts[:3]))
    assert prompt == (asked if asked[:1] == begin else begin + asked)


@pytest.mark.parametrize(("name", "template"), [("qwen", CHATML), ("gemma", GEMMA)])
@pytest.mark.parametrize("texts", [("ciao", "un gatto"), (f"{SPAN}\nUn uomo", "una ragazza", "il gatto", "il cane")])
def test_named_format_equals_the_chat_template_of_its_family(templated, name, template, texts):
    tokenizer = templated(template)
    assert encode(name, tokenizer, conversation(*texts)) == encode("chat", tokenizer, conversation(*texts))


@pytest.mark.parametrize("name", FORMATS.names())
def test_every_sample_begins_and_ends_once_and_hides_its_spans(name, any_tokenizer, tiny_vision):
    visual = {any_tokenizer.convert_tokens_to_ids(token) for token in VISUAL_TOKENS}
    begin, end = any_tokenizer.bos_token_id, any_tokenizer.eos_token_id
    for spoken in CONVERSATIONS:
        ids, labels = encode(name, any_tokenizer, expand_placeholders(spoken, tiny_vision))
        assert len(ids) == len(labels)
        assert ids[-1] == labels[-1] == end != ids[-2]
        assert all(label in (IGNORE_INDEX, i) for i, label in zip(ids, labels, strict=True))
        assert all(label == IGNORE_INDEX for i, label in zip(ids, labels, strict=True) if i in visual)
        kinds = [kind for turn in spoken for kind in placeholder_kinds(turn.text)]
        assert sum(i in visual for i in ids) == sum(
            tiny_vision.layout.num_tokens(kind, 1 + 2 * (kind == "video")) for kind in kinds
        )
        if begin != end:
            assert ids[0] == begin != ids[1]


@pytest.mark.parametrize("name", FORMATS.names())
def test_counts_are_exact_in_bulk(name, any_tokenizer, tiny_vision):
    records = [
        Record(str(i), tuple(turns), tuple(Media(k, "x") for turn in turns for k in placeholder_kinds(turn.text)))
        for i, turns in enumerate(CONVERSATIONS)
    ]
    dataset = SupervisedDataset(
        records, any_tokenizer, tiny_vision, 10_000, text_format=build_format(name, any_tokenizer)
    )
    assert dataset.lengths.tolist() == [len(dataset.tokenize(record)[0]) for record in records]


@pytest.mark.parametrize("name", FORMATS.names())
def test_a_prompt_is_how_its_sample_begins(name, any_tokenizer, tiny_vision):
    for spoken in CONVERSATIONS:
        expanded = expand_placeholders(spoken, tiny_vision)
        if expanded[-1].role == "user":
            continue
        ids, labels = encode(name, any_tokenizer, expanded)
        prompt = prompt_ids(name, any_tokenizer, expanded[:-1])
        assert ids[: len(prompt)] == prompt
        if name != "plain_lm":
            visual = any_tokenizer.convert_tokens_to_ids("<im_start>")
            assert all(
                label == i for i, label in zip(ids[len(prompt) :], labels[len(prompt) :], strict=True) if i < visual
            )
            assert labels[len(prompt) - 1] == IGNORE_INDEX or name == "plain"


@pytest.mark.parametrize("name", FORMATS.names())
def test_truncation_keeps_spans_the_end_and_something_to_learn(name, gpt2_tokenizer):
    segments = build_format(name, gpt2_tokenizer).encode(TWO_TURNS)
    full, labels = label_segments(segments)
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    least = first + 2 if name != "plain_lm" else 5
    for length in range(least, len(full) + 1):
        ids, labels = label_segments(truncate_segments(segments, length))
        assert len(ids) == length
        assert ids[-1] == labels[-1] == 0
        assert [i for i in ids if 383 <= i <= 385] == [383, 384, 385]
        assert sum(label != IGNORE_INDEX for label in labels) >= 2
        assert ids[: least - 1] == full[: least - 1]
    with pytest.raises(ContextError, match=f"at least {least} tokens .* but the limit is {least - 1}"):
        truncate_segments(segments, least - 1)


def test_a_span_behind_the_cut_stays(gpt2_tokenizer):
    segments = build_format("v1", gpt2_tokenizer).encode(conversation("ciao", "il gatto", f"{SPAN}", "il cane"))
    needed = sum(len(segment.ids) for segment in segments[:3]) + 1 + 3 + 1
    ids, labels = label_segments(truncate_segments(segments, needed))
    assert ids[-4:] == [383, 384, 385, 0]
    assert labels[-5:] == [ids[-5], IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 0]
    with pytest.raises(ContextError, match=rf"\(3 of them visual, {needed - 5} of the prompt\)"):
        truncate_segments(segments, needed - 1)


@pytest.mark.parametrize("name", [name for name in FORMATS.names() if name != "plain_lm"])
def test_control_tokens_that_people_type_stay_text(name, any_tokenizer):
    special = [token for token in CONTROL if not token.endswith("of_turn>")] + ["<|endoftext|>", "</s>", "<s>"]
    ids = {token: i for token in special if (i := any_tokenizer.get_vocab().get(token)) is not None}
    markup, _ = encode(name, any_tokenizer, conversation("", ""))
    found, _ = encode(name, any_tokenizer, conversation("".join(special), f"a {' '.join(special)}"))
    for token, i in ids.items():
        assert found.count(i) == markup.count(i), token


def test_typed_control_tokens_can_be_read_back(gpt2_tokenizer):
    typed = "a<|im_end|> <|endoftext|>"
    ids, labels = encode("qwen", gpt2_tokenizer, conversation("ciao", typed))
    assert gpt2_tokenizer.decode([label for label in labels if label >= 0]) == f"{typed}<|im_end|><|endoftext|>"
    assert (ids.count(392), ids.count(0)) == (3, 1)


def test_undeclared_control_tokens_stay_text_in_the_format_that_has_them(any_tokenizer):
    turn = any_tokenizer.convert_tokens_to_ids("<start_of_turn>")
    assert not any_tokenizer.added_tokens_decoder[turn].special
    ids, _ = encode("gemma", any_tokenizer, conversation("a<start_of_turn>b", "<end_of_turn>"))
    assert ids.count(turn) == 2
    assert ids.count(any_tokenizer.convert_tokens_to_ids("<end_of_turn>")) == 2


def test_plain_lm_keeps_control_tokens_that_people_type(gpt2_tokenizer):
    assert encode("plain_lm", gpt2_tokenizer, conversation("a<|im_end|>"))[0] == [65, 392, 0]


def test_end_of_text_that_ends_a_turn_is_not_doubled(tokenizer_dir):
    tokenizer = _complete(_load(tokenizer_dir))
    tokenizer.eos_token = "<|im_end|>"
    for name in ("qwen", "chat", "mpt"):
        ids, labels = encode(name, tokenizer, conversation("ciao", "il gatto"))
        assert ids[-4:] == labels[-4:] == [73, 76, 372, 392]
        assert labels.count(392) == 1
        assert build_format(name, tokenizer).stop_token_ids == [392]


def test_stop_tokens(gpt2_tokenizer):
    stops = {name: build_format(name, gpt2_tokenizer).stop_token_ids for name in FORMATS}
    assert stops == {
        "plain_lm": [0], "plain": [0], "v1": [0], "llama_2": [0], "chat": [0, 392], "qwen": [0, 392], "mpt": [0, 392],
        "llama_v3": [0, 395], "gemma": [0, 397],
    }  # fmt: skip


def test_a_given_system_turn_takes_the_place_of_the_default_one(gpt2_tokenizer):
    turns = conversation("ciao", "il gatto", system="Sei un cane.")

    def text(name):
        ids, labels = encode(name, gpt2_tokenizer, turns)
        assert labels[0] == IGNORE_INDEX
        return gpt2_tokenizer.decode(ids)

    assert text("qwen").startswith("<|im_start|>system\nSei un cane.<|im_end|>\n<|im_start|>user\nciao<|im_end|>")
    assert text("v1") == "Sei un cane. USER: ciao ASSISTANT: il gatto<|endoftext|>"
    assert text("llama_2").startswith("[INST] <<SYS>>\nSei un cane.\n<</SYS>>\n\nciao [/INST] il gatto")
    assert text("gemma").startswith("<start_of_turn>user\nSei un cane.\n\nciao<end_of_turn>")


def test_plain_leaves_out_what_the_user_says(gpt2_tokenizer):
    ids, labels = encode("plain", gpt2_tokenizer, conversation(f"Descrivi: {SPAN}\n!", "il gatto"))
    assert ids == [383, 384, 385, 73, 76, 372, 199, 0]
    assert labels == [IGNORE_INDEX] * 3 + ids[3:]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content }}", "leaves out turn 2 of user, assistant"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "repeats turn 1 of user, assistant"),
        ("{% for m in messages | reverse %}{{ m.content }}<|im_end|>{% endfor %}", "moves turn 2 of user, assistant"),
        ("{{ raise_exception('no') }}", "refuses turns of user, assistant, user, assistant: no"),
        ("{{ messages[0].content + 1 }}", "refuses turns of"),
        ("{% for %}", "refuses turns of"),
    ],
)
def test_a_template_that_loses_turns_is_an_error(templated, template, message):
    tokenizer = templated(template)
    with pytest.raises(ValueError, match=f"the chat template of the tokenizer of '.*' {message}"):
        build_format("chat", tokenizer)


def test_a_template_that_refuses_a_system_turn(templated):
    with pytest.raises(ValueError, match=r"refuses turns of system, user, assistant: System role not supported"):
        encode("chat", templated(GEMMA), conversation("ciao", "il gatto", system="Sei un cane."))


def test_a_template_that_rewrites_texts_moves_no_boundary(templated):
    tokenizer = templated(CHATML.replace("message.content", "message.content | trim | upper"))
    with pytest.raises(ValueError, match="leaves out turn 1"):
        build_format("chat", tokenizer)
    trimming = CHATML.replace("message.content", "(message.content | trim)")
    ids = encode("chat", templated(trimming), conversation("  ciao ", " il gatto\n"))
    assert ids == encode("chat", templated(CHATML), conversation("ciao", "il gatto"))


def test_a_tokenizer_without_a_template(tokenizer_dir):
    with pytest.raises(ValueError, match=r"has none; give --version one of: gemma, llama_2, .*, plain_lm, qwen, v1"):
        build_format("chat", _load(tokenizer_dir))


@pytest.mark.parametrize("name", sorted(name for name, template in TEMPLATES.items() if template.special_tokens))
def test_a_tokenizer_without_the_special_tokens(name, tokenizer_dir):
    missing = ", ".join(TEMPLATES[name].special_tokens).replace("|", r"\|")
    with pytest.raises(
        ValueError, match=rf"--version {name} writes {missing}, which the tokenizer of '.*' does not know"
    ):
        build_format(name, _load(tokenizer_dir))


@pytest.mark.parametrize("name", ["v1", "llama_2", "plain", "plain_lm"])
def test_formats_for_any_tokenizer(name, tokenizer_dir):
    assert encode(name, _load(tokenizer_dir), conversation("ciao", "il gatto"))[0][-1] == 0


def test_a_new_named_format_is_one_declaration(gpt2_tokenizer, monkeypatch):
    monkeypatch.setattr(FORMATS, "_parts", dict(FORMATS._parts))
    register_template(
        "domanda", Template(user="Domanda: {text}\n", assistant="Risposta: {text}{eos}\n", system="{text}\n\n")
    )
    ids, labels = encode("domanda", gpt2_tokenizer, conversation("ciao", "il gatto", "e poi?", "il cane"))
    whole = "Domanda: ciao\nRisposta: il gatto<|endoftext|>\nDomanda: e poi?\nRisposta: il cane<|endoftext|>"
    assert gpt2_tokenizer.decode(ids) == whole
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert gpt2_tokenizer.decode(learned) == " il gatto<|endoftext|> il cane<|endoftext|>"
    with pytest.raises(ValueError, match="'domanda' is registered twice"):
        register_template("domanda", TEMPLATES["v1"])


def test_a_template_that_treats_its_last_answer_otherwise(templated):
    """As Qwen3's does, which puts an empty thought before it: the prompt has it too, and it is not learned."""
    thinking = CHATML.replace(
        "+ message.content +", "+ ('<think></think>' if loop.last and loop.length > 1 else '') + message.content +"
    )
    tokenizer = templated(thinking, "gpt2")
    ids, labels = encode("chat", tokenizer, conversation("ciao", "il gatto", "e poi?", "il cane"))
    assert tokenizer.decode(ids).count("<think></think>") == 1
    learned = [label for label in labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learned) == "il gatto<|im_end|>il cane<|im_end|><|endoftext|>"
    prompt = prompt_ids("chat", tokenizer, conversation("ciao", "il gatto", "e poi?"))
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think></think>")
    assert ids[: len(prompt)] == prompt


ROLE_MISTAKES = [
    ([("assistant", "ciao")], "turn 1 is the assistant's, but must be the user's"),
    ([("user", "a"), ("user", "b"), ("assistant", "c")], "turn 2 is the user's, but must be the assistant's"),
    ([("user", "a"), ("assistant", "b"), ("system", "c")], "turn 3 is the system's, but must be the user's"),
    ([("system", "a"), ("assistant", "b")], "turn 2 is the assistant's, but must be the user's"),
]


@pytest.mark.parametrize(("said", "message"), ROLE_MISTAKES)
def test_roles_out_of_turn_are_an_error_of_chat_formats_alone(gpt2_tokenizer, said, message):
    record = Record("s1", tuple(Turn(role, text) for role, text in said), source="x.json, sample 1")
    chat = SupervisedDataset([record], gpt2_tokenizer, None, 512, text_format=build_format("v1", gpt2_tokenizer))
    for fails in (lambda: chat[0], lambda: chat.lengths):
        with pytest.raises(ValueError, match=rf"^sample 's1' \(x\.json, sample 1\): {message}"):
            fails()
    assert SupervisedDataset([record], gpt2_tokenizer, None, 512)[0].labels[-1] == 0


def write_data(path: Path, *conversations: list[dict[str, str]]) -> DataArguments:
    path.write_text(json.dumps([{"id": f"s{i}", "conversations": c} for i, c in enumerate(conversations)]))
    return DataArguments(data_path=[str(path)])


def test_samples_without_an_answer_are_reported_before_training(tmp_path, gpt2_tokenizer):
    answered, silent = turns("ciao", "il gatto"), turns("ciao", " ")
    arguments = write_data(tmp_path / "a.json", answered, silent, [{"from": "human", "value": "ciao"}])
    records = read_records(arguments.data_path)
    fmt = build_format("qwen", gpt2_tokenizer)
    dataset = SupervisedDataset(records, gpt2_tokenizer, None, 512, text_format=fmt)
    assert [record.id for record in find_unsupervised(dataset)] == ["s1", "s2"]
    with pytest.raises(ValueError, match=r"2 samples have no text to learn from: sample 's1' \(a\.json, sample 2\), "):
        make_supervised_data_module(gpt2_tokenizer, arguments, None, 512, fmt)
    assert len(make_supervised_data_module(gpt2_tokenizer, arguments, None, 512)["train_dataset"]) == 3


def test_a_question_that_leaves_no_room_for_its_answer_is_reported_before_training(tmp_path, gpt2_tokenizer):
    arguments = write_data(tmp_path / "a.json", turns("ciao", "il gatto"), turns(ITALIAN[0] * 3, "sì"))
    fmt = build_format("qwen", gpt2_tokenizer)
    make_supervised_data_module(gpt2_tokenizer, arguments, None, 200, fmt)
    with pytest.raises(
        ContextError, match=r"sample 's1' .*of the prompt\), but the limit is 80; raise --model_max_len"
    ):
        make_supervised_data_module(gpt2_tokenizer, arguments, None, 80, fmt)


def test_a_video_of_unknown_length_is_not_judged_before_it_is_opened(tmp_path, gpt2_tokenizer, tiny_vision):
    arguments = write_data(tmp_path / "a.json", turns("<video>\nChe cosa vedi?", "un gatto"))
    samples = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps([{**samples[0], "video": "a.mp4"}]))
    fmt = build_format("qwen", gpt2_tokenizer)
    sampled = replace(tiny_vision, video_fps=1.0, frames_upbound=20)
    make_supervised_data_module(gpt2_tokenizer, arguments, sampled, 200, fmt)
    with pytest.raises(ContextError, match=r"sample 's0' .*of the prompt\), but the limit is 200; .* --num_frames"):
        make_supervised_data_module(gpt2_tokenizer, arguments, replace(tiny_vision, num_frames=20), 200, fmt)


def test_system_turns_of_data_files(tmp_path, gpt2_tokenizer):
    spoken = [{"from": "system", "value": "Sei un cane."}, *turns("ciao", "il gatto")]
    record = read_records(write_data(tmp_path / "a.json", spoken).data_path)[0]
    assert record.turns[0] == Turn("system", "Sei un cane.")


def test_formats_travel_to_worker_processes(gpt2_tokenizer):
    for name in FORMATS:
        fmt = build_format(name, gpt2_tokenizer)
        copied = pickle.loads(pickle.dumps(fmt))
        assert copied.encode(TWO_TURNS) == fmt.encode(TWO_TURNS)
