"""What benchmarks.ops measures: per op of nemotune, the call, transformers' call on the same tensors, and its useful operations.

transformers' convolution and scan know no borders: they are measured on a row of one document, and again, as a trainer feeds them, on
the packed row's documents padded to the longest. Frozen weights want no gradient, as under LoRA. The NF4 of transformers is bitsandbytes'.
On CUDA our scan and convolution are what `ops.kernels` chooses: with `NEMOTUNE_KERNELS=torch`, PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import NemotronHConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from benchmarks.roofline import attention_flops, scan_flops
from nemotune.models.base import LOGITS_PER_CHUNK, Head
from nemotune.ops import nf4
from nemotune.ops.attention import varlen_attention
from nemotune.ops.conv import causal_conv1d
from nemotune.ops.cross_entropy import IGNORE, linear_cross_entropy
from nemotune.ops.documents import Documents
from nemotune.ops.experts import Routing, dispatch
from nemotune.ops.grouped import grouped_linear
from nemotune.ops.norm import gated_group_rms_norm, rms_norm
from nemotune.ops.ssd import ssd


@dataclass(frozen=True)
class Size:
    """Widths by the names that config.json has for them; `ceiling` is the side of the square product."""

    tokens: int
    hidden_size: int
    mamba_num_heads: int
    n_groups: int
    num_attention_heads: int
    n_routed_experts: int
    moe_intermediate_size: int
    vocab_size: int
    ceiling: int
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    chunk_size: int = 128
    conv_kernel: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 128
    num_experts_per_tok: int = 6


SIZES = {
    "small": Size(48, 64, 2, 1, 4, 8, 32, 256, 128, chunk_size=16),
    "scaled": Size(1024, 704, 16, 2, 8, 32, 464, 32768, 2048),
    "nano": Size(4096, 2688, 64, 8, 32, 128, 1856, 131072, 8192),
}


@dataclass(frozen=True)
class Case:
    """One comparison. `inputs` want gradients; `as_ours` brings their result into the form of ours; `flops` are of the products, both ways."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    inputs: Sequence[Tensor] = ()
    flops: float = 0.0
    as_ours: Callable[[Tensor], Tensor] = lambda result: result


@dataclass(frozen=True)
class Data:
    """Random tensors of one size and dtype, and a row of documents whose lengths are log-normal."""

    size: Size
    dtype: torch.dtype
    device: str

    def draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None, trained: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        values = (torch.randn(shape, generator=generator) * scale).to(self.device, dtype or self.dtype)
        return values.requires_grad_(trained)

    def documents(self, *lengths: int) -> Documents:
        return Documents(torch.tensor([0, *lengths], device=self.device).cumsum(0).int())

    @cached_property
    def packed(self) -> Documents:
        tokens = self.size.tokens
        found = torch.empty(12).log_normal_(0.0, 0.8, generator=torch.Generator().manual_seed(0))
        lengths = (found / found.sum() * tokens).int().clamp(min=1).tolist()
        return self.documents(*lengths[:-1], tokens - sum(lengths[:-1]))


def conv(data: Data) -> Iterator[Case]:
    s = data.size
    channels = s.mamba_num_heads * s.mamba_head_dim + 2 * s.n_groups * s.ssm_state_size
    x, weight, bias = data.draw(s.tokens, channels), data.draw(channels, s.conv_kernel, trained=False), data.draw(channels, trained=False)
    whole = data.documents(s.tokens)

    def call() -> Tensor:
        return theirs.causal_conv1d_fn(x.T[None], weight, bias, activation="silu")

    yield Case("convolution, one document", lambda: causal_conv1d(x, weight, bias, whole), call, [x], as_ours=lambda y: y[0].T)


def scan(data: Data) -> Iterator[Case]:
    s = data.size
    x = data.draw(s.tokens, s.mamba_num_heads, s.mamba_head_dim)
    dt = F.softplus(data.draw(s.tokens, s.mamba_num_heads, dtype=torch.float32, trained=False) - 4).requires_grad_()
    A = -torch.linspace(1, 16, s.mamba_num_heads, device=data.device)
    B, C = (data.draw(s.tokens, s.n_groups, s.ssm_state_size, scale=0.1) for _ in range(2))
    D = torch.ones(s.mamba_num_heads, device=data.device)

    def run(documents: Documents) -> Tensor:
        return ssd(x, dt, A, B, C, D, documents, chunk_size=s.chunk_size)[0]

    def run_theirs(documents: Documents) -> Tensor:
        rows = [pad_sequence(t.split(documents.lengths), batch_first=True) for t in (x, dt, B, C)]
        return theirs.mamba2_chunk_scan(rows[0], rows[1], A, rows[2], rows[3], chunk_size=s.chunk_size, D=D)

    def unpad(y: Tensor, documents: Documents) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(y, documents.lengths, strict=True)])

    for name, row in (("one document", data.documents(s.tokens)), (f"{len(data.packed.lengths)} documents", data.packed)):
        call, call_theirs = partial(run, row), partial(run_theirs, row)
        yield Case(f"scan, {name}", call, call_theirs, [x, dt, B, C], scan_flops(s, s.tokens), partial(unpad, documents=row))


def attention(data: Data) -> Iterator[Case]:
    """Theirs: one call with a mask of blocks, as transformers runs a packed row."""
    s, documents = data.size, data.packed
    q = data.draw(s.tokens, s.num_attention_heads, s.head_dim)
    k, v = (data.draw(s.tokens, s.num_key_value_heads, s.head_dim) for _ in range(2))
    same = documents.indices_T.unsqueeze(1) == documents.indices_T.unsqueeze(0)
    mask = same.tril()[None, None]
    module = SimpleNamespace(num_key_value_groups=s.num_attention_heads // s.num_key_value_heads, is_causal=True)

    def call() -> Tensor:
        return sdpa_attention_forward(module, *(t.transpose(0, 1)[None] for t in (q, k, v)), attention_mask=mask)[0]

    flops = attention_flops(s, documents.lengths)
    name = f"attention, {len(documents.lengths)} documents"
    yield Case(name, lambda: varlen_attention(q, k, v, documents), call, [q, k, v], flops, lambda y: y[0])


def norm(data: Data) -> Iterator[Case]:
    s = data.size
    inner = s.mamba_num_heads * s.mamba_head_dim
    x, gate, y = data.draw(s.tokens, inner), data.draw(s.tokens, inner, scale=2.0), data.draw(s.tokens, s.hidden_size)
    gated = theirs.NemotronHRMSNormGated(inner, inner // s.n_groups, 1e-5).to(data.device, data.dtype).requires_grad_(False)
    plain = theirs.NemotronHRMSNorm(s.hidden_size, 1e-5).to(data.device, data.dtype).requires_grad_(False)
    yield Case("RMSNorm", lambda: rms_norm(y, plain.weight, 1e-5), lambda: plain(y), [y])
    ours = partial(gated_group_rms_norm, x, gate, gated.weight, num_groups=s.n_groups, eps=1e-5)
    yield Case("gated group RMSNorm", ours, lambda: gated(x, gate), [x, gate])


def experts(data: Data) -> Iterator[Case]:
    """Theirs: its default on this version, one grouped product for all experts."""
    s = data.size
    names = ("hidden_size", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    config = NemotronHConfig(hybrid_override_pattern="E", **{name: getattr(s, name) for name in names})
    config._experts_implementation = "grouped_mm"
    module = theirs.NemotronHExperts(config).to(data.device, data.dtype).requires_grad_(False)
    up, down = (data.draw(*w.shape, scale=0.05, trained=False) for w in (module.up_proj, module.down_proj))
    module.up_proj.data, module.down_proj.data = up, down
    x = data.draw(s.tokens, s.hidden_size)
    chosen = data.draw(s.tokens, s.n_routed_experts, dtype=torch.float32, trained=False).topk(s.num_experts_per_tok).indices.sort(-1).values
    routing = Routing(chosen, torch.full_like(chosen, 1 / s.num_experts_per_tok, dtype=torch.float32))

    def call() -> Tensor:
        sent = dispatch(routing, s.n_routed_experts)
        h = F.relu(grouped_linear(sent.sorted_rows(x), up, sent.ends_E)).square()
        return sent.combine(grouped_linear(h, down, sent.ends_E))

    flops = 8 * s.tokens * s.num_experts_per_tok * s.hidden_size * s.moe_intermediate_size  # two products, both ways, frozen weights
    yield Case("experts", call, lambda: module(x, routing.experts_TK, routing.weights_TK), [x], flops)


def cross_entropy(data: Data) -> Iterator[Case]:
    """Half of the tokens are supervised. Theirs: logits of the whole row, then the loss."""
    s = data.size
    hidden = data.draw(s.tokens, s.hidden_size)
    head = Head(s.hidden_size, s.vocab_size, bias=False, device=data.device, dtype=data.dtype).requires_grad_(False)
    targets = torch.randint(s.vocab_size, (s.tokens,), generator=torch.Generator().manual_seed(0)).to(data.device)
    targets[: s.tokens // 2] = IGNORE
    supervised = int((targets != IGNORE).sum())
    chunk = max(1, LOGITS_PER_CHUNK[data.device == "cuda"] // s.vocab_size)

    def call() -> Tensor:
        logits = F.linear(hidden, head.weight)
        return ForCausalLMLoss(logits, None, s.vocab_size, shift_labels=targets, num_items_in_batch=1)

    flops = 4 * supervised * s.hidden_size * s.vocab_size
    yield Case("linear cross entropy", lambda: linear_cross_entropy(head, hidden, targets, chunk_tokens=chunk), call, [hidden], flops)


def four_bits(data: Data) -> Iterator[Case]:
    """Dequantising has no gradient; the product has that of its input. Rows are whole blocks of 64: bitsandbytes misreads others on a CPU."""
    import bitsandbytes as bnb

    s = data.size
    shape = (2 * s.hidden_size, s.hidden_size)
    x, weight = data.draw(s.tokens, s.hidden_size), data.draw(*shape, scale=0.05, trained=False)
    quantized = nf4.quantize(weight)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours, dequantized = partial(nf4.dequantize, quantized, shape, data.dtype), partial(bnb.functional.dequantize_4bit, codes, state)
    yield Case("NF4, dequantise", ours, dequantized)
    flops = 4 * s.tokens * shape[0] * shape[1]
    yield Case("NF4, product", lambda: nf4.nf4_linear(x, quantized, shape), lambda: bnb.matmul_4bit(x, codes.t(), state), [x], flops)


CASES = (conv, scan, attention, norm, experts, cross_entropy, four_bits)
