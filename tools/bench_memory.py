"""Peak memory and seconds of one learner step at a real size on a CPU, beside plain training steps.

    python tools/bench_memory.py [--arms bf16,int8,host,sgd-fp32,sgd,adamw,trl] [--sequences 16] ...

A randomly initialised Qwen2.5-0.5B shape (494 M parameters, vocabulary 151,936, tied) in bf16, on sequences
of which the first quarter is the prompt, with a policy-gradient loss. Each arm is a process of its own.

    bf16, int8, host   one step of frugal_rl.learn.Learner (float32 arithmetic) on weights in that form
    learner-ARM        the same step with a baseline of `frugal-rl compare`: learner-adamw, learner-adamw8bit,
                       learner-sgd-momentum, learner-lora:RANK, learner-lora-int8:RANK
    sgd, adamw         transformers in bf16, gradient checkpointing, the whole batch at once, torch.optim
    sgd-fp32           the same in float32: the arithmetic that the learner does
    trl                the learning part of TRL's GRPOTrainer in bf16: SGD, checkpointing, the whole batch
                       at once, rollouts handed to it; needs trl, a dependency of this script only

`over`: peak resident memory over that of the process once torch and transformers' model class (and TRL)
are imported. The learner's memory is divided by the plan from `--budget`. Random weights have a dense
gradient: `--lr` is set so that a step changes some 0.1 % of the entries, as with trained models. For the
bf16 plain arms `--plain-sequences` may be smaller, as bf16 products are slow on a CPU without bf16 units:
their memory grows with the sequences, so the ratio is at most that.

Measured on 2 cores of an AMD EPYC without bf16 units, torch 2.13, OMP_NUM_THREADS=1; over 340 MiB of
libraries. Seconds of one run each; 16 x 512: one core each, little else running. bf16 / sgd-fp32: 1.53 of the
seconds, 0.09 of the memory. Of the difference, the second forward pass for states that were not kept is 0.16
by FLOPs; blocks of 2 MiB and more that go back to the system at once cost about 0.2 (4 x 512: 138 s of CPU
time, 109 with blocks up to 32 MiB kept).

    arm, --sequences x --tokens, --budget     over       planned   every   seconds
    int8      2 x 64     1.5GiB               754 MiB    755 MiB   1       30
    int8      4 x 256    1.5GiB               856 MiB    875 MiB   1       97
    int8      16 x 512   1.4GiB               1.2 GiB    1.2 GiB   2       698
    bf16      2 x 64     2GiB                 1.2 GiB    1.2 GiB   1       39
    bf16      4 x 256    2GiB                 1.3 GiB    1.3 GiB   1       127
    bf16      16 x 512   1.85GiB              1.7 GiB    1.7 GiB   2       607
    host      2 x 64     1.5GiB               867 MiB    816 MiB   1       23
    host      4 x 256    1.5GiB               951 MiB    936 MiB   1       85
    sgd-fp32  16 x 512                        18.5 GiB                     398
    trl       2 x 32                          2.2 GiB                      55
    sgd       2 x 32                          2.6 GiB                      85
    adamw     2 x 32                          4.4 GiB                      92

Baselines (`learner-ARM`: two steps, the second timed, so that all states are in place) with plain SGD beside
them in one run of this script, `--sequences 2 --tokens 64`, budget 64GiB, busy machine; over 422 to 475 MiB,
the more with bitsandbytes or peft. The last column: of int8's memory.

    int8                  2 x 64              754 MiB    756 MiB   1       23     1
    learner-lora-int8:16  2 x 64              813 MiB    740 MiB   1       13     1.08
    bf16                  2 x 64              1.2 GiB    1.2 GiB   1       13     1.58
    learner-lora:16       2 x 64              1.2 GiB    1.2 GiB   1       6      1.69
    learner-adamw8bit     2 x 64              8.2 GiB    5.7 GiB   1       28     11.2
    learner-adamw         2 x 64              8.8 GiB    8.4 GiB   1       11     12.0

bitsandbytes' 8-bit step on a CPU takes float32 scratch for the whole tensor, here the embedding; its masters
and states are 2.8 GiB, those of adamw 5.5; the gradient is 1.8.

Not measured: host at 16 x 512. sgd in bf16 with 2 x 512 did not end in 16 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frugal_rl.arms import Arm
from frugal_rl.config import parse_bytes
from frugal_rl.console import size
from frugal_rl.memory import (
    Plan,
    Shape,
    Work,
    peak_resident_bytes,
    plan,
    return_free_memory,
    return_large_blocks,
    with_learner,
)

QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
CLIP = 1.0
SCALE = 0.02  # of the loss: the norm is then below the clip, as in training
FORMS = ("bf16", "int8", "host")
LEARNER = "learner-"
ADAM_LR, LORA_LR = 1e-6, 1e-5


@dataclass(frozen=True)
class Options:
    """Of one arm."""

    arm: str
    sequences: int
    tokens: int
    budget: str
    boundary_every: int | None
    layers_together: int | None
    lr: float
    folder: str


def arm_of(name: str) -> Arm:
    """A form alone is plain SGD on it."""
    if name in FORMS:
        return Arm(name, "sgd", name, None)
    return Arm.parse(name.removeprefix(LEARNER))


def make_plan(arm: Arm, sequences: int, tokens: int, budget_bytes: int) -> Plan:
    """The plan that `train` would make on a CPU."""
    shape = Shape.from_config(QWEN_05B)
    rank = int(arm.number or 1) if arm.kind == "lora" else None
    work = Work(
        sequences=sequences,
        prompt_tokens=tokens // 4,
        response_tokens=tokens - tokens // 4,
        storage_bytes=2,
        compute_bytes=4,
        has_host=False,
        form=arm.weights,
    )
    return plan(shape, with_learner(work, shape, arm.kind, rank), budget_bytes)


def write_checkpoint(folder: Path) -> None:
    """The random model, as a file: 0.9 GiB."""
    import torch
    from safetensors.torch import save_file

    config = _config()
    torch.manual_seed(0)
    tensors = {}
    for name, parameter in _skeleton(config).named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16)
        tensors[name] = tensor.fill_(1.0) if "norm" in name else tensor.normal_(0, 0.02)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def learner_step(options: Options) -> dict[str, Any]:
    """Bytes held before the weights are loaded, seconds of the step and what it did."""
    import numpy as np
    import torch

    from frugal_rl.arms import DENSE
    from frugal_rl.baselines import require
    from frugal_rl.decoder import Decoder, parameter_names
    from frugal_rl.learn import Learner
    from frugal_rl.lora import make_baseline
    from frugal_rl.rollout import Rollout
    from frugal_rl.weights import Weights

    return_large_blocks()  # as `train` does on a CPU
    config, arm = _config(), arm_of(options.arm)
    require(arm.kind)
    names = parameter_names(config)
    baseline = peak_resident_bytes()
    form, sequences, tokens = arm.weights, options.sequences, options.tokens
    weights = Weights.from_checkpoint(
        Path(options.folder),
        torch.device("cpu"),
        name="random",
        names=names,
        quantise=form != "bf16",
        stream=form == "host",
        whole=arm.kind in DENSE,
    )
    return_free_memory()
    loaded = peak_resident_bytes()
    rng = np.random.default_rng(0)
    prompt = tokens // 4
    rollouts = [
        Rollout(
            tuple(rng.integers(0, config.vocab_size, prompt).tolist()),
            rng.integers(0, config.vocab_size, tokens - prompt),
            np.zeros(tokens - prompt, np.float32),
            False,
            np.zeros(tokens - prompt, np.float32),
        )
        for _ in range(sequences)
    ]
    advantage_B = torch.linspace(-1, 1, sequences)
    planned = make_plan(arm, sequences, tokens, parse_bytes(options.budget))
    every = options.boundary_every or planned.boundary_every
    together = options.layers_together or planned.layers_together
    decoder = Decoder(config, weights)
    lr = {"sgd": options.lr, "sgd-momentum": options.lr, "lora": LORA_LR}.get(arm.kind, ADAM_LR)
    number = {"rank": int(arm.number or 1)} if arm.kind == "lora" else {"momentum": arm.number}
    other = make_baseline(arm.kind, decoder, lr=lr, clip=CLIP, **number)
    learner = Learner(
        decoder,
        lr,
        CLIP,
        1.0,
        planned.micro_tokens,
        boundary_every=every,
        layers_together=together,
        baseline=other,
    )
    if other:  # memory of states is taken when it is first written to
        learner.step(rollouts, lambda logprob_BT: (logprob_BT.mean() * SCALE, {}))
    began, cpu = time.perf_counter(), time.process_time()
    step = learner.step(rollouts, lambda logprob_BT: (-SCALE * (logprob_BT.mean(1) * advantage_B).mean(), {}))
    return {
        "baseline_bytes": baseline,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "loaded_bytes": loaded - baseline,
        "weights_bytes": weights.nbytes,
        "optimizer_bytes": other.nbytes if other else 0,
        "planned_bytes": planned.learning_bytes,
        "micro_tokens": planned.micro_tokens,
        "boundary_every": every,
        "layers_together": together,
        "norm": step.commit.norm,
        "changed": step.commit.entries / weights.parameters,
    }


def plain_step(options: Options) -> dict[str, Any]:
    """Transformers' own model and loop."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config()
    baseline = peak_resident_bytes()
    torch.manual_seed(0)
    dtype = torch.float32 if options.arm == "sgd-fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train()
    model.gradient_checkpointing_enable()
    token_BT = torch.randint(config.vocab_size, (options.sequences, options.tokens))
    advantage_B = torch.linspace(-1, 1, options.sequences)
    first = options.tokens // 4
    optimiser = (
        torch.optim.AdamW(model.parameters(), lr=1e-6)
        if options.arm == "adamw"
        else torch.optim.SGD(model.parameters(), lr=options.lr)
    )
    began, cpu = time.perf_counter(), time.process_time()
    keep = options.tokens - first + 1
    logit_BTV = model(token_BT, use_cache=False, logits_to_keep=keep).logits[:, :-1]
    loss_BT = torch.nn.functional.cross_entropy(
        logit_BTV.flatten(0, 1), token_BT[:, first:].flatten(), reduction="none"
    ).view(options.sequences, -1)
    (SCALE * (loss_BT.mean(1) * advantage_B).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimiser.step()
    return {
        "baseline_bytes": baseline,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }


def trl_step(options: Options) -> dict[str, Any]:
    """One optimizer step of TRL's GRPOTrainer; the rollouts are random tokens that cost nothing."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    config = _config()
    baseline = peak_resident_bytes()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    first = options.tokens // 4
    began: list[float] = []

    def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        began.append(time.perf_counter())
        count = len(prompts)
        ids = torch.randint(2, config.vocab_size, (count, options.tokens)).tolist()
        response = [row[first:] for row in ids]
        logprobs = [[0.0] * len(row) for row in response]
        return {"prompt_ids": [row[:first] for row in ids], "completion_ids": response, "logprobs": logprobs}

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            began.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        GRPOTrainer(
            model,
            lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            args=GRPOConfig(
                output_dir=out,
                max_steps=1,
                per_device_train_batch_size=options.sequences,
                num_generations=options.sequences,
                max_completion_length=options.tokens - first,
                gradient_checkpointing=True,
                optim="sgd",
                learning_rate=options.lr,
                lr_scheduler_type="constant",
                max_grad_norm=CLIP,
                bf16=True,
                use_cpu=True,
                beta=0.0,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a"}] * options.sequences),
            processing_class=tokenizer,
            rollout_func=rollouts,
            callbacks=[Stop()],
        ).train()
    return {"baseline_bytes": baseline, "seconds": began[-1] - began[0]}


def _config() -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model("qwen2", **QWEN_05B)


def _skeleton(config: Any) -> Any:
    from frugal_rl.decoder import build_skeleton

    return build_skeleton(config)


def run_arm(options: Options) -> None:
    """In a process of its own: one JSON line."""
    ours = options.arm in FORMS or options.arm.startswith(LEARNER)
    step = learner_step if ours else trl_step if options.arm == "trl" else plain_step
    row = step(options)
    peak = peak_resident_bytes()
    print(json.dumps({**asdict(options), **row, "over_bytes": peak - row["baseline_bytes"]}))


def report(row: dict[str, Any]) -> None:
    line = (
        f"{row['arm']:<22}{row['sequences']:>3} x {row['tokens']} tokens: {size(row['over_bytes'])} over "
        f"{size(row['baseline_bytes'])}, {row['seconds']:.0f} s"
    )
    if "cpu_seconds" in row:
        line += f" ({row['cpu_seconds']:.0f} s of CPU time)"
    if "planned_bytes" in row:
        line += (
            f"; planned {size(row['planned_bytes'])} (ratio {row['over_bytes'] / row['planned_bytes']:.2f}), "
            f"micro-batches of {row['micro_tokens']} tokens, every {row['boundary_every']} boundaries, "
            f"{row['layers_together']} layers together, "
            f"{row['changed']:.2%} of the entries changed; loading took {size(row['loaded_bytes'])}, "
            f"the weights are {size(row['weights_bytes'])}"
        )
        if row["optimizer_bytes"]:
            line += f", masters, states or adapters {size(row['optimizer_bytes'])}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arms", default="bf16,int8,host,sgd-fp32,sgd,adamw,trl")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--plain-sequences", type=int, help="of sgd, adamw and trl [as --sequences]")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence, prompt included")
    parser.add_argument("--budget", default="64GiB", help="of memory, that the plan divides [64GiB]")
    parser.add_argument("--boundary-every", type=int, help="layers [as planned]")
    parser.add_argument("--layers-together", type=int, help="that go backward in one graph [as planned]")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="append a line an arm to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_arm(Options(**json.loads(given.one)))
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `train` does, for every arm
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write = f"import bench_memory as b, pathlib; b.write_checkpoint(pathlib.Path({folder!r}))"
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", write], cwd=here, check=True)
        for arm in given.arms.split(","):
            fewer = arm in ("sgd", "adamw", "trl") and given.plain_sequences
            sequences = given.plain_sequences if fewer else given.sequences
            options = Options(
                arm,
                sequences,
                given.tokens,
                given.budget,
                given.boundary_every,
                given.layers_together,
                given.lr,
                folder,
            )
            words = [sys.executable, __file__, "--one", json.dumps(asdict(options))]
            done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
            rows[arm] = json.loads(done.stdout.splitlines()[-1])
            report(rows[arm])
            if given.json:
                with open(given.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[arm]) + "\n")
    for form in [arm for arm in rows if arm in FORMS]:
        for arm in [arm for arm in rows if arm not in FORMS]:
            mine, row = rows[form], rows[arm]
            per_token = mine["seconds"] / mine["sequences"] * row["sequences"] / row["seconds"]
            note = "" if row["sequences"] == mine["sequences"] else f" (of {row['sequences']} sequences)"
            print(
                f"{form} / {arm}: {mine['over_bytes'] / row['over_bytes']:.2f} of the memory{note}, "
                f"{per_token:.2f} of the seconds a token"
            )


if __name__ == "__main__":
    main()
