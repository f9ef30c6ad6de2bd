"""What a training step of HealDA v2 costs a GPU: memory, compute and communication, by arithmetic.

Bytes and parameters are exact (tests compare them with what is counted); times and activations are estimates from the
rates of `Device` and the counts of `passes` and `KEPT`. docs/scaling.md gives every assumption with its source.
Letters: P parameters, C hidden size, X places, T frames, N = T X tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
NODE = 8  # GPUs that NVLink joins
PUBLISHED = {  # 8 x H100, ms: NVIDIA/physicsnemo#1758
    "a block, eager": 16.5,
    "a block, compiled": 14.5,
    "reshard round trip, forward": 0.29,
    "reshard round trip, forward and backward": 0.97,
}


@dataclass(frozen=True)
class Architecture:
    """HealDA v2; the defaults are the published model of 1,506,070,474 parameters."""

    hidden_size: int = 1536
    depth: int = 32
    places: int = 12288
    frames: int = 8
    mlp_ratio: int = 4
    condition_size: int = 128
    noise_channels: int = 128
    observation_width: int = 2048  # 64 heads of 32
    observation_kv_width: int = 64  # 2 heads of 32
    token_size: int = 32
    patch_cells: int = 4
    inputs: int = 2
    outputs: int = 74
    table_rows: int = 1024
    table_width: int = 4 + 16 + 8  # type, channel, platform
    features: int = 50
    film_hidden: int = 64
    observations: float = 31e6  # of a sample: the thinned archive

    @property
    def tokens(self) -> int:
        return self.frames * self.places

    @property
    def block_parameters(self) -> int:
        c, wide, narrow, given = self.hidden_size, self.observation_width, self.observation_kv_width, self.token_size
        attention = 2 * (4 * c * c + 4 * c)  # spatial and temporal
        modulation = 12 * c * (self.condition_size + 1)
        mlp = 2 * self.mlp_ratio * c * c + (self.mlp_ratio + 1) * c
        observations = 2 * c * wide + wide + c + 2 * given * narrow + narrow
        return attention + modulation + mlp + observations

    @property
    def parameters(self) -> int:
        c, film, token, noise = self.hidden_size, self.film_hidden, self.token_size, self.condition_size
        encoder = self.places * c + self.inputs * self.patch_cells * c + c
        decoder = 2 * c * (noise + 1) + c * self.outputs * self.patch_cells + self.outputs
        condition = (self.noise_channels + 1) * noise + (noise + 1) * noise
        described = self.features + self.table_width
        tokenizer = self.table_rows * self.table_width + (described + 1) * film + 2 * film + (film + 1) * 2 * token
        return self.depth * self.block_parameters + encoder + decoder + condition + tokenizer


@dataclass(frozen=True)
class Device:
    """One GPU and what it reaches of its peak: all rates in bytes or operations a second."""

    name: str
    memory: float
    peak: float  # bf16, dense
    bandwidth: float  # of its memory
    matrix_share: float = 0.65  # of the peak, in large products: assumed
    attention_share: float = 0.35  # of the peak: FlashAttention-2 on H100
    bandwidth_share: float = 0.8  # assumed
    link: float = 370e9  # NVLink, one direction, as NCCL gets it of 450e9
    network: float = 48e9  # InfiniBand NDR, one adapter a GPU, as NCCL gets it of 50e9


H100 = Device("H100 80 GB", memory=80 * GB, peak=989e12, bandwidth=3.35e12)
H200 = Device("H200 141 GB", memory=141 * GB, peak=989e12, bandwidth=4.8e12)
EAGER = 2.5  # passes over memory that fusion would save, as a factor on them: assumed


@dataclass(frozen=True)
class Plan:
    """How the ranks share the work: dp = gpus / cp groups, each with `samples` samples a step."""

    gpus: int
    cp: int = 8
    samples: int = 1
    fsdp: bool = False
    checkpoint: bool = False

    def __post_init__(self):
        assert self.gpus % self.cp == 0

    @property
    def dp(self) -> int:
        return self.gpus // self.cp

    @property
    def nodes(self) -> int:
        return -(-self.gpus // NODE)


def reshard_bytes(*, ranks: int, blocks: int, tokens: int, hidden_size: int, itemsize: int, backward: bool) -> int:
    """Bytes that a rank sends in a step to mix frames, at least: every token there and back, and their gradients.

    tokens: those that this rank holds; 1 / ranks of them stay with it.
    """
    ways = 4 if backward else 2
    return blocks * ways * tokens * hidden_size * itemsize * (ranks - 1) // ranks


def gradient_bytes(parameters: int, *, ranks: int) -> int:
    """Bytes that a rank sends to average float32 gradients around a ring."""
    return 2 * 4 * parameters * (ranks - 1) // ranks


def products(model: Architecture) -> tuple[float, float]:
    """Forward operations of a block on one sample: in matrix products with weights, and in spatial attention."""
    c, n = model.hidden_size, model.tokens
    weights = 8 * c * c + 2 * c * model.observation_width + 2 * model.mlp_ratio * c * c
    return 2.0 * n * weights, 4.0 * n * model.places * c


def passes(model: Architecture) -> tuple[float, float]:
    """Bytes of memory that everything but products reads and writes in a block, forward and backward, if fused.

    In bf16 tensors of all tokens: 4 norms (2 forward, 3 backward), 4 gates (3, 3), norms of queries and keys (4, 6),
    temporal attention (4, 7). Attention to observations reads queries and observations once, and again for gradients.
    """
    tensor = 2.0 * model.tokens * model.hidden_size
    queries = 2.0 * model.tokens * model.observation_width
    observations = 2.0 * model.observations * model.token_size
    return 28 * tensor + 2 * queries + observations, 37 * tensor + 4 * queries + 2 * observations


@dataclass(frozen=True)
class Block:
    """Milliseconds of a block on one rank."""

    forward: float
    backward: float
    reshard: float  # forward and backward

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.reshard


def reshard_ms(model: Architecture, device: Device, plan: Plan, *, backward: bool) -> float:
    """Of one block: sending, and one copy before and after each exchange."""
    if plan.cp == 1:
        return 0.0
    tokens = plan.samples * model.tokens // plan.cp
    sent = reshard_bytes(
        ranks=plan.cp, blocks=1, tokens=tokens, hidden_size=model.hidden_size, itemsize=2, backward=backward
    )
    copied = (4 if backward else 2) * 2 * 2 * tokens * model.hidden_size * 2  # each copy reads and writes
    rate = device.link if plan.cp <= NODE else device.network
    return 1e3 * (sent / rate + copied / (device.bandwidth * device.bandwidth_share))


def block(model: Architecture, device: Device, plan: Plan, *, eager: bool = True) -> Block:
    share = plan.samples / plan.cp
    weights, attention = products(model)
    moved = [bytes_ * (EAGER if eager else 1) for bytes_ in passes(model)]

    def ms(weights: float, attention: float, moved: float) -> float:
        return (1e3 * share) * (
            weights / (device.peak * device.matrix_share)
            + attention / (device.peak * device.attention_share)
            + moved / (device.bandwidth * device.bandwidth_share)
        )

    forward, backward = ms(weights, attention, moved[0]), ms(2 * weights, 2.5 * attention, moved[1])
    if plan.checkpoint:
        backward += forward
    exchanged = reshard_ms(model, device, plan, backward=True)
    if plan.checkpoint:
        exchanged += reshard_ms(model, device, plan, backward=False)
    return Block(forward, backward, exchanged)


def parameters_ms(model: Architecture, device: Device, plan: Plan) -> float:
    """Averaging gradients, or with FSDP gathering bf16 weights twice and scattering float32 gradients.

    Within a node by NVLink, then among nodes, one adapter a GPU; one after the other, which is pessimistic.
    """
    local, bytes_ = min(plan.gpus, NODE), float(model.parameters)
    volume = bytes_ * (2 * 2 + 4) if plan.fsdp else bytes_ * 2 * 4
    within = volume * (local - 1) / local / device.link
    among = volume / local * (plan.nodes - 1) / plan.nodes / device.network
    return 1e3 * (within + among)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. activations: from the estimate of the literature to what `models/memory.py` counts."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    copies: float  # bf16 weights, buckets of gradients
    activations: tuple[float, float]

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def totals(self) -> tuple[float, float]:
        low, high = self.activations
        return self.state + self.copies + low, self.state + self.copies + high


KEPT = (17 * 2.0, 0.6 * 127.1)  # bytes a token, channel and block; see docs/scaling.md
STREAM = 4.0  # bytes a token and channel that a recomputed block keeps: its input, float32


def memory(model: Architecture, plan: Plan) -> Memory:
    shards = plan.gpus if plan.fsdp else 1
    parameters = float(model.parameters)
    values = plan.samples * model.tokens / plan.cp * model.hidden_size
    described = plan.samples * model.observations / plan.cp * 4 * (model.features + 8)
    blocks = 1 if plan.checkpoint else model.depth
    inputs = STREAM * values * model.depth if plan.checkpoint else 0.0
    low, high = (values * kept * blocks + inputs + described for kept in KEPT)
    outside = model.parameters - model.depth * model.block_parameters
    # Two blocks whole in bf16 and their gradients in float32; or everything in bf16, and gradients again in buckets.
    copies = 2 * (2.0 + 4.0) * model.block_parameters + 2.0 * outside if plan.fsdp else (2.0 + 4.0) * parameters
    return Memory(
        weights=4 * parameters / shards,
        gradients=4 * parameters / shards,
        optimizer=8 * parameters / shards,
        average=4 * parameters / shards,
        copies=copies,
        activations=(low, high),
    )


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step on one rank."""

    forward: float
    backward: float
    reshard: float
    parameters: float
    exposed: float  # of `parameters`: what does not fit beside the backward pass
    update: float

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.reshard + self.exposed + self.update


def step(model: Architecture, device: Device, plan: Plan) -> Step:
    one = block(model, device, plan)
    exchange = parameters_ms(model, device, plan)
    backward = model.depth * one.backward
    updated = 36.0 * model.parameters / (plan.gpus if plan.fsdp else 1)  # five tensors read, four written
    return Step(
        forward=model.depth * one.forward,
        backward=backward,
        reshard=model.depth * one.reshard,
        parameters=exchange,
        exposed=max(exchange - backward, exchange / model.depth),
        update=1e3 * updated / (device.bandwidth * device.bandwidth_share),
    )


def comparison(model: Architecture, device: Device = H100) -> dict[str, tuple[float, float]]:
    """Estimated and published milliseconds on 8 GPUs, one frame each."""
    plan = Plan(gpus=8, cp=8)
    estimated = (
        block(model, device, plan).total,
        block(model, device, plan, eager=False).total,
        reshard_ms(model, device, plan, backward=False),
        reshard_ms(model, device, plan, backward=True),
    )
    return {name: (mine, theirs) for mine, (name, theirs) in zip(estimated, PUBLISHED.items(), strict=True)}
