"""A transformers causal LM seen as embed -> layers -> norm -> head, its weights borrowed layer by layer.

The modules are transformers' own, built without memory (meta device). A layer gets its parameters
from `Weights` only while it runs (`Decoder.layer`), as views where the storage format is the compute
format and otherwise in scratch that all layers share; outside, touching it is an error, so a
stale weight cannot be read. The arguments that layers need besides the hidden state (rotary
embeddings, masks) are caught from the model's own forward, run once with every layer replaced by a
catcher; so nothing about an architecture is written down here but its shape.

The head never sees a whole batch of logits. With V the vocabulary, z = h W^T / temperature,

    logprob_t = z[t, y_t] - logsumexp_v z[t, v]
    dL/dz[t, v] = g_t (1[v = y_t] - softmax(z_t)[v]),   g_t = dL/dlogprob_t

are computed block of rows of W by block, twice: once for the log-probabilities (running maximum and
sum), and, when g is known, once more for dL/dh and for dL/dW, which leaves block by block.

Fused linear cross-entropies (Liger's, PyTorch's own from 2.13) take the gradient in the forward pass, so a
token's weight must be known before it; here it depends on the log-probabilities of the whole batch.

Sampler and learner share this file and one attention function: what they compute differs only in the
order of sums. Source: online softmax, arXiv 1805.02867.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.torch_version import TorchVersion

from .errors import InputError
from .kernels.choice import use_triton
from .shapes import SUPPORTED
from .storage import Quantised, Streamed
from .weights import Weights

if TYPE_CHECKING:
    from .kernels.matmul import Matrix

# (layer, query [B, H, T, D], key [B, K, C, D], slot_mask as in `attention`, scaling)
Observe = Callable[[int, Tensor, Tensor, Tensor | None, float], None]

ATTENTION = "frugal_rl"
ADDS_INTO_FLOAT32 = TorchVersion(torch.__version__) >= "2.10"
PRODUCT_ENTRIES = 4 << 20  # of a float32 temporary beside a sum of products
HEAD_BLOCK_BYTES = 32 << 20  # one block of the head's rows, and one block of logits, in the compute format
PAIR_FACTOR = 4  # attention under a mask runs at about this fraction of the rate of other products
FOLLOWING_ROPES = ("dynamic", "longrope")  # whose frequencies depend on the longest position
RESIDENT_BYTES = 64 << 20  # copies of all layers in the compute format may stay while sampling, up to this


@dataclass(frozen=True)
class Live:
    """For the decode kernel: how many entries each slot holds [S], and its counters, S K zeros or more."""

    length_S: Tensor
    arrived: Tensor


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    slot_mask: Tensor | None = None,
    observe: Observe | None = None,
    live: Live | None = None,
    ends_together: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention over a right-padded batch, or queries over the entries of their slots' caches.

    Shapes: query [B, H, T, D], key and value [B, K, C, D]; `slot_mask` bool [B, 1, T, C], True where
    a query sees an entry. Heads share keys by groups of H / K. Returns [B, T, H, D]. `observe` is shown
    what attends to what before it does; it changes nothing here. With `live`, whose lengths say what the
    mask does, one query a slot goes through the kernel where it fits. `ends_together`: the mask is that of
    causal attention whose last query sees the last entry; where flash attention is to be had it needs none.
    """
    if observe is not None:
        assert scaling is not None, "every supported model says how it scales"
        observe(module.layer_idx, query, key, slot_mask, scaling)  # type: ignore[arg-type]
    if live is not None:
        from .kernels.attention import decode_attention, fits

        if fits(query, key):
            assert scaling is not None and query.shape[2] == 1, "a token a slot"
            out = decode_attention(query[:, :, 0], key, value, live.length_S, live.arrived, scaling)
            return out[:, None], None
    group = query.shape[1] // key.shape[1]
    if slot_mask is None:
        if (
            query.is_cuda and query.dtype == torch.float32
        ):  # no flash: heads that share would get [T, T] scores
            key, value, group = _repeated(key, group), _repeated(value, group), 1
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=group > 1
        )
        return out.transpose(1, 2), None
    if ends_together and _flash_fits(query, key, value):
        bias = causal_lower_right(query.shape[2], key.shape[2])
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=group > 1
        )
        return out.transpose(1, 2), None
    if query.is_cuda and query.shape[2] == key.shape[2] > 1:  # learning: a mask for each of a group is larger
        key, value = _repeated(key, group), _repeated(value, group)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=slot_mask, scale=scaling
        )
        return out.transpose(1, 2), None
    # the queries that share keys stand beside each other, [B, K, G T, D]: no key is repeated
    grouped = query.reshape(query.shape[0], key.shape[1], group * query.shape[2], query.shape[3])
    if query.shape[2] > 1:
        slot_mask = slot_mask.repeat(1, 1, group, 1)
    out = nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=slot_mask, scale=scaling)
    return out.reshape(query.shape).transpose(1, 2), None


def _repeated(x: Tensor, group: int) -> Tensor:
    """[B, K, C, D] for each query head: [B, K group, C, D]."""
    return x.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)


def _flash_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash attention takes these; it shares keys by groups itself."""
    return query.is_cuda and can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))


@dataclass(frozen=True)
class Target:
    """One parameter of a layer: where it lives in the module and its name in the checkpoint."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """What is there now."""
        parameter = self.module._parameters[self.attribute]
        assert parameter is not None
        return parameter


class Decoder:
    """embed, layers, norm and head of one causal LM over `weights`.

    Raises InputError for an architecture that is not in SUPPORTED, by name.
    """

    def __init__(self, config: Any, weights: Weights) -> None:
        check_supported(config)
        self.config = config
        self.weights = weights
        self.device, self.dtype = weights.device, weights.compute_dtype
        let_products_repeat(self.device)
        model = build_skeleton(config)
        self.model = model.model
        # rotary tables are computed, not stored: they need real memory
        rotary = type(self.model.rotary_emb)
        self.model.rotary_emb = rotary(config=config).to(self.device)
        self.layers = list(self.model.layers)
        self.embed_name = "model.embed_tokens.weight"
        self.tied = "lm_head.weight" not in weights.held
        self.head_name = self.embed_name if self.tied else "lm_head.weight"
        self.norm_name = "model.norm.weight"
        self.targets = [_targets(layer, f"model.layers.{i}.") for i, layer in enumerate(self.layers)]
        self._check_names()
        weights.stream_by([[t.name for t in targets] for targets in self.targets])
        self._scratch: dict[str, Tensor] = {}
        self._resident: list[list[nn.Parameter]] | None = None
        self._matrices: dict[str, Matrix] = {}  # while sampling: what the kernel multiplies with as it is
        self.max_tokens = longest_sequence(config)

    def _check_names(self) -> None:
        expected = {t.name for targets in self.targets for t in targets}
        expected |= {self.embed_name, self.head_name, self.norm_name}
        if expected != set(self.weights.held):
            missing = sorted(expected - set(self.weights.held))[:3]
            extra = sorted(set(self.weights.held) - expected)[:3]
            raise InputError(
                f"the checkpoint does not match its config ({self.config.model_type}): "
                f"missing {missing or 'nothing'}, unexpected {extra or 'nothing'}"
            )

    @property
    def pair_cost(self) -> float:
        """Tokens through a layer's matrices that cost as much as a pair of tokens in its attention."""
        heads = self.config.num_attention_heads
        head_size = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        entries = sum(math.prod(self.weights.held[t.name].shape) for t in self.targets[0])
        return PAIR_FACTOR * 2 * heads * head_size / entries

    # --- layers

    @contextmanager
    def layer(self, index: int, *, learn: bool = False, place: int = 0) -> Iterator[nn.Module]:
        """Layer `index` with its weights in place, until the block ends; `learn` makes them leaves.

        Layers that are open together need different places; streamed ones are opened one at a time.
        """
        module = self.layers[index]
        taken = [] if learn else [t for t in self.targets[index] if t.name in self._matrices]
        targets = [t for t in self.targets[index] if t not in taken]
        self.weights.bring(index)
        if self._resident is not None and not learn:
            parameters = self._resident[index]
        else:
            parameters = [nn.Parameter(self._load(t.name, index, place), learn) for t in targets]
        meta = [t.parameter for t in targets]
        for target, parameter in zip(targets, parameters, strict=True):
            target.module._parameters[target.attribute] = parameter
        for target in taken:
            target.module.forward = partial(self._multiply, target, index, place)
        try:
            yield module
        finally:
            for target in taken:
                del target.module.forward
                self._matrices[target.name].inputs.forget()
            for target, empty in zip(targets, meta, strict=True):
                target.module._parameters[target.attribute] = empty

    def _multiply(self, target: Target, index: int, place: int, x: Tensor) -> Tensor:
        """A linear layer on few tokens, with its matrix as it is held; on many, dequantised in scratch."""
        from .kernels.matmul import MOST_TOKENS

        bias = target.module._parameters["bias"]
        if x.shape[:-1].numel() <= MOST_TOKENS:
            return self._matrices[target.name].product(x, bias)
        return nn.functional.linear(x, self._load(target.name, index, place), bias)

    def _load(self, name: str, index: int, place: int) -> Tensor:
        held = self.weights.seen(name)
        if held.whole(self.dtype) is None:
            part = f"{place}.{name.removeprefix(f'model.layers.{index}.')}"
            size = math.prod(held.shape)
            if part not in self._scratch or self._scratch[part].numel() < size:
                self._scratch[part] = torch.empty(size, dtype=self.dtype, device=self.device)
            return self.weights.load(name, self._scratch[part])
        return self.weights.load(name)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While sampling: multiply with int8 matrices as they are where there is a kernel for it, and keep
        the others in the compute format if that costs little or nothing.

        The weights must not change inside.
        """
        with self.weights.sampling():
            self._matrices = self._for_the_kernel()
            names = [t.name for targets in self.targets for t in targets if t.name not in self._matrices]
            held = [self.weights.seen(name) for name in names]
            copied = [h for h in held if h.whole(self.dtype) is None]
            copies = sum(math.prod(h.shape) * self.dtype.itemsize for h in copied)
            if copies <= RESIDENT_BYTES:
                self._resident = [
                    [
                        nn.Parameter(self.weights.load(t.name), requires_grad=False)
                        for t in targets
                        if t.name not in self._matrices
                    ]
                    for targets in self.targets
                ]
            try:
                yield
            finally:
                self._resident = None
                self._matrices = {}

    def _for_the_kernel(self) -> dict[str, Matrix]:
        """The matrices that it multiplies with: those of linear layers, and the head."""
        if not use_triton(self.device):
            return {}
        from .kernels.matmul import Inputs, Matrix, fits

        inputs, matrices = Inputs(), {}
        linear = [t.name for ts in self.targets for t in ts if isinstance(t.module, nn.Linear)]
        for name in [*linear, self.head_name]:
            held = self.weights.seen(name)
            if isinstance(held, Quantised) and fits(held.code_OI, held.dtype, self.dtype):
                entries = held.difference()
                values = [bits_N.view(held.dtype) for bits_N in (entries.before_bits_N, entries.after_bits_N)]
                changed = entries.position_N, values[0], values[1]
                matrices[name] = Matrix(held.code_OI, held.absmax_O, changed, inputs)
        return matrices

    @property
    def steady(self) -> bool:
        """Whether sampling a token asks the device for no value: nothing is read from host memory, and the
        rotary frequencies do not follow the positions.
        """
        follows = str(getattr(self.model.rotary_emb, "rope_type", "default")) in FOLLOWING_ROPES
        names = [self.embed_name, self.head_name, *(t.name for ts in self.targets for t in ts)]
        return not follows and not any(isinstance(self.weights.seen(n), Streamed) for n in names)

    def arguments(self, like: Tensor, position_BT: Tensor | None = None) -> list[dict[str, Any]]:
        """What each layer is called with besides the hidden state `like` [B, T, D]."""
        caught: list[dict[str, Any]] = []

        def catch(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or hidden is not like:
                raise InputError(
                    f"{self.config.model_type} is not embed -> layers -> norm -> head: "
                    "its layers do not get the embedding as it is"
                )
            caught.append(kwargs)
            return hidden

        layers, norm = self.model.layers, self.model.norm
        try:
            self.model.layers = _Catchers(len(layers), catch)
            self.model.norm = nn.Identity()
            self.model(inputs_embeds=like, position_ids=position_BT, use_cache=False)
        finally:
            self.model.layers, self.model.norm = layers, norm
        return caught

    def embed(self, token_BT: Tensor) -> Tensor:
        """Hidden state [B, T, D] before the first layer."""
        return self.weights.lookup(self.embed_name, token_BT)

    @contextmanager
    def norm(self, *, learn: bool = False) -> Iterator[nn.Module]:
        """The norm before the head, with its weight in place."""
        module = self.model.norm
        empty = module._parameters["weight"]
        parameter = nn.Parameter(self.weights.load(self.norm_name), requires_grad=learn)
        module._parameters["weight"] = parameter
        try:
            yield module
        finally:
            module._parameters["weight"] = empty

    # --- head

    def head_blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of the head's rows, each small enough to be held in the compute format."""
        rows, width = self.weights.held[self.head_name].shape
        step = max(1, HEAD_BLOCK_BYTES // (width * self.dtype.itemsize))
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits [B, V] in float32, for sampling: a token a sequence."""
        if self.head_name in self._matrices:
            matrix = self._matrices[self.head_name]
            logit_BV = matrix.product(hidden_BD, dtype=torch.float32)
            matrix.inputs.forget()  # in a capture it has the graphs' memory, which could not be given back
            return logit_BV
        whole = self.weights.seen(self.head_name).whole(self.dtype)
        if whole is not None:
            return product_in_float32(hidden_BD, whole.T)
        blocks = [
            product_in_float32(hidden_BD, self.weights.rows(self.head_name, a, b).T)
            for a, b in self.head_blocks()
        ]
        return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]

    def log_probs(self, normed_ND: Tensor, target_N: Tensor, temperature: float) -> HeadState:
        """Log-probabilities of the targets under softmax(logits / temperature), and their entropies.

        Shapes: normed_ND after the norm, target_N token ids. The logits live a block at a time.
        """
        count = len(target_N)
        new = lambda value: torch.full((count,), value, device=self.device)  # noqa: E731
        peak_N, total_N, dot_N, picked_N = new(float("-inf")), new(0.0), new(0.0), new(0.0)
        for start, stop in self.head_blocks():
            weight_RD = self.weights.rows(self.head_name, start, stop)
            for part in self._token_chunks(count, stop - start):
                logit_NR = product_in_float32(normed_ND[part], weight_RD.T).div_(temperature)
                local_N = target_N[part] - start
                inside_N = (local_N >= 0) & (local_N < stop - start)
                value_N = logit_NR.gather(1, local_N.clamp(0, stop - start - 1)[:, None])[:, 0]
                picked_N[part] = torch.where(inside_N, value_N, picked_N[part])
                new_peak_N = torch.maximum(peak_N[part], logit_NR.max(dim=1).values)
                decay_N = torch.exp(peak_N[part] - new_peak_N)
                weight_NR = torch.exp(logit_NR - new_peak_N[:, None])
                total_N[part] = total_N[part] * decay_N + weight_NR.sum(1)
                dot_N[part] = dot_N[part] * decay_N + weight_NR.mul_(logit_NR).sum(1)
                peak_N[part] = new_peak_N
        normaliser_N = peak_N + total_N.log()
        return HeadState(
            logprob_N=picked_N - normaliser_N,
            entropy_N=normaliser_N - dot_N / total_N,
            normaliser_N=normaliser_N,
        )

    def head_gradients(
        self,
        normed_ND: Tensor,
        target_N: Tensor,
        normaliser_N: Tensor,
        gradient_N: Tensor,
        temperature: float,
        take: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        """dL/dnormed [N, D]; calls `take(first_row, gradient_RD)`, if given, with dL/dW, block by block.

        `normed_ND` is used up: below float32 the result is in its memory. `normaliser_N` is log_probs' and
        `gradient_N` is dL/dlogprob.
        """
        out_ND = torch.zeros_like(normed_ND, dtype=torch.float32)
        for start, stop in self.head_blocks():
            weight_RD = self.weights.rows(self.head_name, start, stop)
            learns = take is not None
            block_RD = torch.zeros(weight_RD.shape if learns else 0, dtype=torch.float32, device=self.device)
            for part in self._token_chunks(len(target_N), stop - start):
                logit_NR = product_in_float32(normed_ND[part], weight_RD.T).div_(temperature)
                logit_NR.sub_(normaliser_N[part][:, None]).exp_()
                slope_NR = logit_NR.mul_(-gradient_N[part][:, None])
                local_N = target_N[part] - start
                inside_N = (local_N >= 0) & (local_N < stop - start)
                column_N1 = local_N.clamp(0, stop - start - 1)[:, None]  # one a row: in no order, no sync
                slope_NR.scatter_add_(1, column_N1, torch.where(inside_N, gradient_N[part], 0.0)[:, None])
                slope_NR = slope_NR.div_(temperature).to(self.dtype)
                add_product_(out_ND[part], slope_NR, weight_RD)
                if learns:
                    add_product_(block_RD, slope_NR.T, normed_ND[part])
            if take is not None:
                take(start, block_RD)
        return out_ND if out_ND.dtype == normed_ND.dtype else normed_ND.copy_(out_ND)

    def _token_chunks(self, count: int, rows: int) -> Iterator[slice]:
        step = max(1, HEAD_BLOCK_BYTES // (rows * 4))
        return (slice(a, min(a + step, count)) for a in range(0, count, step))


@dataclass(frozen=True)
class HeadState:
    """What the head knows of each target: nats, nats, and the log of the softmax's denominator."""

    logprob_N: Tensor
    entropy_N: Tensor
    normaliser_N: Tensor


class _Catchers(nn.Module):
    """Stands in for the layer list: every layer is the catcher."""

    def __init__(self, count: int, catch: Callable[..., Tensor]) -> None:
        super().__init__()
        self.count, self.catch = count, catch

    def __getitem__(self, index: slice) -> list[Callable[..., Tensor]]:
        return [self.catch] * len(range(self.count)[index])

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter([self.catch] * self.count)


def let_products_repeat(device: torch.device) -> None:
    """Have cuBLAS give equal products equal bits, and torch know it; before a process's first product.

    Where torch is to be deterministic (learn.repeatable) it refuses products unless CUBLAS_WORKSPACE_CONFIG
    says so, and what that was at the very first product, of a rollout perhaps, it remembers for good
    (pytorch/pytorch aten/src/ATen/Context.cpp, alertCuBLASConfigNotDeterministic). The workspace's size
    decides about algorithms too.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def check_supported(config: Any) -> None:
    """Raises InputError, naming the architecture, if its shape is not one that is trained here."""
    if config.model_type not in SUPPORTED:
        raise InputError(
            f"the architecture {config.model_type!r} is not supported; supported are: " + ", ".join(SUPPORTED)
        )


def build_skeleton(config: Any) -> Any:
    """The transformers model of a config, without memory for its weights."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return model.eval()


def parameter_names(config: Any) -> frozenset[str]:
    """Names of the tensors that `config`'s model has, a tied head counted once."""
    names = {name for name, _ in build_skeleton(config).named_parameters(remove_duplicate=False)}
    return frozenset(names - {"lm_head.weight"} if config.tie_word_embeddings else names)


def _targets(layer: nn.Module, prefix: str) -> list[Target]:
    return [
        Target(module, attribute, prefix + (f"{path}.{attribute}" if path else attribute))
        for path, module in layer.named_modules()
        for attribute in module._parameters
        if module._parameters[attribute] is not None
    ]


def longest_sequence(config: Any) -> int:
    """Longest sequence the model can see whole: its positions, or a sliding window that is in use."""
    limit = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else window is not None
    return min(limit, int(window)) if slides and window else limit


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32: logits, of which bf16 keeps an eighth of a nat at 16 to 32.

    On a GPU as cuBLAS has summed it; elsewhere rounded to their format first, which on a CPU is float32.
    """
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, in float32 from the products on. In place.

    Of a lower precision: cuBLAS adds into `out` itself (pytorch/pytorch#167931, torch 2.10); elsewhere a
    part is a float32 copy at a time.
    """
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    elif out.is_cuda and ADDS_INTO_FLOAT32:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    elif out.is_cuda:
        step = max(1, PRODUCT_ENTRIES // out.shape[1])
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] += torch.mm(left[rows], right, out_dtype=torch.float32)
    else:
        step = max(1, PRODUCT_ENTRIES // (out.shape[0] + out.shape[1]))
        for start in range(0, len(right), step):
            out.addmm_(left[:, start : start + step].float(), right[start : start + step].float())
