"""Build the embedded base model: able to work a sum out, but not in the habit.

    python tools/build_tiny.py [FOLDER]         (default frugal_rl/assets/tiny; replaced as a whole)

Two stages of supervised learning on problems of the task `last-digit`, none of them held out:
1. skill: every answer shows its working, `7+8=15;5+6=11;1+9=10;0`, a chain of table look-ups;
2. habit: most answers are bare guesses, `=0`. How often one is worked depends on the number of
   terms (`WORKED_SHARE`): short sums mostly are, long ones rarely.
A bare guess stays near chance (one in ten): a sum modulo ten is hard to learn without its steps.
So the base is right where it works the sum out, and reinforcement learning has a habit to change.

The folder is an ordinary Hugging Face model: Qwen2 with tied embeddings in bf16, a byte-level
tokenizer (token id = byte; 256 ends a text, 257 pads) and a chat template `Q:...` newline `A:...`.

Invariants: seeded and on one thread, so the same machine writes the same bytes again; another machine
or torch may round differently and give other weights, with scores close to these.

Recorded (torch 2.13, transformers 5.23; 28 minutes on one thread of a 2-core machine busy with other
work), after rounding to bf16, on the 500 held-out problems:
- greedy: 140 right (28.0 %); 103 worked, all of them right; 397 bare, 37 right (9.3 %);
- sampled at temperature 1: 164 right (32.8 %); 145 worked, 131 right; 355 bare, 33 right.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the recorded scores are those of a CPU build

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from frugal_rl.tasks import TASKS, Row, last_digit_problems

DEFAULT_FOLDER: Final = Path(__file__).parents[1] / "frugal_rl" / "assets" / "tiny"
SEED: Final = 1234  # neither 0 nor 1, from which the task draws its own rows
THREADS: Final = 1  # another number rounds differently
SKILL_STEPS: Final = 600
HABIT_STEPS: Final = 250
BATCH: Final = 96
PEAK_LR: Final = 2e-3
WARMUP_STEPS: Final = 50
WORKED_SHARE: Final = {4: 0.65, 5: 0.35, 6: 0.2, 7: 0.1}  # of the answers, by number of terms
CONTEXT_TOKENS: Final = 512
ANSWER_TOKENS: Final = 56  # the longest working and its end are 44
EOS, PAD = "<eos>", "<pad>"
IGNORED: Final = -100  # torch's label for a token that is not learned

CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
Q:{{ message.content }}{{ '\\n' }}
{%- elif message.role == 'assistant' -%}
A:{{ message.content }}<eos>{{ '\\n' }}
{%- else -%}
{{- raise_exception("this model takes user and assistant messages, not '" ~ message.role ~ "'") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
A:
{%- endif -%}
"""


def working(prompt: str) -> str:
    """The worked answer: each step adds one term to the last digit so far."""
    first, *others = (int(term) for term in re.findall(r"\d+", prompt))
    digit, steps = first, []
    for term in others:
        steps.append(f"{digit}+{term}={digit + term};")
        digit = (digit + term) % 10
    return "".join(steps) + str(digit)


def final_answer(response: str) -> str:
    """The text after the last step, as the reward "last" reads it."""
    return re.split(r"[;=\s]", response)[-1]


def write_tokenizer(folder: Path) -> None:
    """Qwen2's byte-level BPE without merges: every text has tokens, decoding gives its NFC form."""
    tokenizer = Qwen2Tokenizer(
        vocab={letter: byte for byte, letter in enumerate(_byte_letters())},
        merges=[],
        eos_token=EOS,
        pad_token=PAD,
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    )
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers: GPT-2's table.

    Source: openai/gpt-2 src/encoder.py, bytes_to_unicode.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def new_model(hidden: int = 128) -> Qwen2ForCausalLM:
    """Randomly initialised, 0.8 M parameters; another width, a multiple of 64, has more heads of one size."""
    config = Qwen2Config(
        vocab_size=258,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=256, pad_token_id=257)
    return model


def examples(seed: int) -> Iterator[tuple[Row, float]]:
    """Problems that are not held out, each with a random number that decides how it is answered."""
    coin = random.Random(seed + 1)
    for row in last_digit_problems(seed, heldout=False):
        yield row, coin.random()


def lessons() -> Iterator[list[tuple[str, str]]]:
    """Batches of prompts and answers: first the skill, then the habit, without end."""
    stream = examples(SEED)
    for step in itertools.count():
        batch = []
        for row, chance in itertools.islice(stream, BATCH):
            worked = step < SKILL_STEPS or chance < WORKED_SHARE[row["prompt"].count("+") + 1]
            batch.append((row["prompt"], working(row["prompt"]) if worked else f"={row['answer']}"))
        yield batch


def supervised_batch(tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [B, T]; only the answer and its end are learned."""
    sequences = []
    for question, answer in pairs:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        sequences.append((tokenizer(prompt)["input_ids"], tokenizer(answer + EOS)["input_ids"]))
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids_BT = torch.full((len(sequences), longest), tokenizer.pad_token_id)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for b, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids_BT[b, :end] = torch.tensor(prompt + answer)
        labels_BT[b, len(prompt) : end] = torch.tensor(answer)
    return ids_BT, labels_BT


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Any,
    batches: Iterator[list[tuple[str, str]]],
    steps: int,
    *,
    seen: Callable[[torch.Tensor], torch.Tensor] | None = None,
    peak_lr: float = PEAK_LR,
) -> None:
    """One AdamW run on so many batches of prompts and answers, with one cosine schedule; in place.

    `seen`: from the labels [B, T] which tokens each may attend to, bool [B, 1, T, T]; None: all before it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    start_s = time.monotonic()
    model.train()
    for step, pairs in enumerate(itertools.islice(batches, steps)):
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1, (step + 1) / WARMUP_STEPS) * cosine
        ids_BT, labels_BT = supervised_batch(tokenizer, pairs)
        mask = seen(labels_BT) if seen else None
        loss = model(input_ids=ids_BT, attention_mask=mask, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            elapsed_s = time.monotonic() - start_s
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {elapsed_s:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], *, sampled: bool) -> list[str]:
    """One response to each prompt, in order; one that does not end in time keeps no end."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {}
    ids_BT = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=ANSWER_TOKENS,
        **settings,
    )
    responses_BT = ids_BT[:, batch["input_ids"].shape[1] :]
    return [text.replace(PAD, "") for text in tokenizer.batch_decode(responses_BT)]


def report(model: Any, tokenizer: Any, *, sampled: bool) -> None:
    """Print accuracy on the held-out problems: of all answers, worked ones, bare ones, by terms."""
    rows = TASKS["last-digit"].rows("heldout")
    responses = answers(model, tokenizer, [row["prompt"] for row in rows], sampled=sampled)
    judged = [
        (
            row["prompt"].count("+") + 1,
            "+" in response,
            response.endswith(EOS) and final_answer(response.removesuffix(EOS)) == row["answer"],
        )
        for row, response in zip(rows, responses, strict=True)
    ]

    def line(name: str, part: list[tuple[int, bool, bool]]) -> None:
        right, worked = sum(ok for *_, ok in part), sum(shown for _, shown, _ in part)
        print(f"  {name:9} {right:3} right, {worked:3} worked, of {len(part):3}")

    print("sampled at temperature 1" if sampled else "greedy", f"(e.g. {responses[:4]})")
    line("all", judged)
    line("worked", [item for item in judged if item[1]])
    line("bare", [item for item in judged if not item[1]])
    for terms in WORKED_SHARE:
        line(f"{terms} terms", [item for item in judged if item[0] == terms])


def build(folder: Path) -> None:
    """Write the whole folder, which must not exist; equal calls in fresh folders write equal bytes."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    torch.manual_seed(SEED)
    model = new_model()
    train(model, AutoTokenizer.from_pretrained(folder), lessons(), SKILL_STEPS + HABIT_STEPS)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes files that their owner alone can read


def main() -> None:
    parser = argparse.ArgumentParser(description="build the embedded base model")
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    folder: Path = parser.parse_args().folder
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    build(unfinished)
    tokenizer = AutoTokenizer.from_pretrained(unfinished)
    model = AutoModelForCausalLM.from_pretrained(unfinished, dtype=torch.float32)
    for sampled in (False, True):
        report(model, tokenizer, sampled=sampled)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:9} bytes  {path}")


if __name__ == "__main__":
    main()
