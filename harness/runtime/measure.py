"""Measure one subject: build its arms, hold its products to `decode()`, then time it or weigh it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from harness.environment import cpu_name
from harness.estimate import available_memory
from harness.metrics.decode import ArmTimes, BandTimes, Decode
from harness.metrics.memory import Memory
from harness.metrics.phases import Phases
from harness.runtime.banded import Bands
from harness.runtime.bandwidth import Bandwidth, measure_bandwidth
from harness.runtime.build import MakeProduct, MakeWeights, packed_products
from harness.runtime.decoder import Decoder, Weights
from harness.runtime.products import DenseProduct, Product, dense_product, kernels_used, tune_products
from harness.runtime.stepper import Stepper
from harness.runtime.throughput import Steps, interleaved
from harness.spec import DecodeSpec, MemorySpec, RuntimeSpec
from kernels.errors import NumericalError
from kernels.layouts import PackedWeight

# Of a product against decode() in float64, relative to its norm. The norm of many rows hides one that is wrong, so no
# entry may be off by more than _FURTHEST times that, relative to a typical one.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_FURTHEST = 8
# Cache lengths are rounded up to this, so that a few more tokens do not make another shape.
_CACHE_STEP = 64
# Token ids of the prompt are below this; every model has more.
_VOCABULARY = 1000
# What the dense arm needs over its weights: the cache, activations, and what an allocator loses between tensors.
_HEADROOM = 1.1


@dataclass(frozen=True)
class Subject:
    """What is measured. layer: packed weights of block 0 by product. weights: makes all of the model's. payload_bytes:
    stored bytes of the packed weights."""

    name: str
    layer: dict[str, list[PackedWeight]]
    weights: MakeWeights
    unquantized: bool
    payload_bytes: int
    device: torch.device
    dtype: torch.dtype


def measure_decode(spec: DecodeSpec, subject: Subject, phases: Phases, progress: Steps) -> Decode:
    """Raises NumericalError if a product is not that of the decoded weight."""
    device = subject.device
    bandwidth = measure_bandwidth(device)
    prompt = _prompt(spec, subject)
    arms: dict[str, Stepper] = {}
    absent: dict[str, str] = {}
    packed: Weights | None = None
    bands: Bands | None = None
    correctness: dict[str, float] = {"relative_error": 0.0, "tolerance": TOLERANCE[subject.dtype]}
    used = {"all": "torch"}
    if spec.runtime != "dense" and not subject.unquantized:
        with phases.measure("build"):
            packed, bands = _packed_weights(spec, subject)
            tune_products(packed.blocks[0].products, spec.batch, subject.dtype)
        correctness["relative_error"] = _gate(subject, packed, bands, spec.batch)
        used = kernels_used(packed.blocks[0].products)
        _add_arms(arms, absent, "packed", packed, spec, prompt, bands)
    _let_go(device)
    needed, free = _HEADROOM * _dense_bytes(subject, packed), available_memory(str(device))
    if arms and needed > free:
        absent["dense"] = f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    else:
        _add_dense(arms, absent, subject, spec, prompt, phases)
        _let_go(device)
    with phases.measure("decode"):
        found = interleaved(arms, spec.rounds, bandwidth.copy_gb_s, progress)
    main = next(name for name in ("packed", "packed-eager", "dense", "dense-eager") if name in found)
    baseline = found.get(main.replace("packed", "dense"))
    return Decode(
        value=found[main].tokens_per_second,
        dataset=_setting(spec),
        device=_device_name(device),
        dtype=str(subject.dtype).removeprefix("torch."),
        runtime=spec.runtime,
        synthetic=spec.synthetic,
        batch=spec.batch,
        prompt=spec.prompt,
        tokens=spec.tokens,
        threads=torch.get_num_threads(),
        arms=found,
        speedup=None
        if main.startswith("dense") or baseline is None
        else found[main].tokens_per_second / baseline.tokens_per_second,
        token_latency_ms=found[main].ms_p50,
        copy_gb_s=bandwidth.copy_gb_s,
        roofline_tokens_per_second=spec.batch * bandwidth.copy_gb_s * 1e9 / found[main].bytes_per_token,
        correctness=correctness,
        kernels=used,
        absent=absent,
        bands=None if bands is None else _band_times(bands, arms[main], found[main], bandwidth),
    )


def measure_memory(spec: MemorySpec, subject: Subject, phases: Phases) -> Memory:
    """Build, prefill and decode once, and weigh what is there."""
    device = subject.device
    own = Phases(str(device))
    bands: Bands | None = None
    _let_go(device)
    with own.measure("load"):
        if spec.runtime == "dense" or subject.unquantized:
            weights = subject.weights(dense_products(device, subject.dtype))
        else:
            weights, bands = _packed_weights(spec, subject)
    _let_go(device)
    stepper = Stepper(_decoder(weights, spec, bands), _prompt(spec, subject), spec.tokens - 1)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    with own.measure("prefill"):
        stepper.prefill()
    with own.measure("decode"):
        stepper.decode()
    peak = own.measured["decode"].get("peak_allocated_bytes")
    linear = weights.linear_bytes
    host = 0
    if bands is not None:
        host = bands.host_bytes
        linear += bands.device_bytes - host
    other = _other_bytes(weights)
    payload = linear if subject.unquantized or spec.runtime == "dense" else subject.payload_bytes
    phases.measured.update({f"memory {name}": entry for name, entry in own.measured.items()})
    return Memory(
        value=linear + other,
        dataset=_setting(spec),
        device=_device_name(device),
        dtype=str(subject.dtype).removeprefix("torch."),
        runtime=spec.runtime,
        synthetic=spec.synthetic,
        batch=spec.batch,
        prompt=spec.prompt,
        tokens=spec.tokens,
        linear_bytes=linear,
        ledger_bytes=payload,
        over_ledger=(linear + host - (bands.device_bytes if bands else 0)) / payload - 1,
        other_bytes=other,
        host_bytes=host,
        dense_bytes=2 * packed_parameters(subject),
        kv_cache_bytes=stepper.decoder.cache.nbytes,
        activation_bytes=None if before is None or peak is None else peak - before,
        phases=own.measured,
    )


def _let_go(device: torch.device) -> None:
    """Give back what is gone: until then an allocator keeps it, and NVML and the free memory count it as used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def dense_products(device: torch.device, dtype: torch.dtype) -> MakeProduct:
    """Products of the decoded weights, the way of the dense runtime."""

    def make(index: int, name: str, weights: list[PackedWeight], biases: list[torch.Tensor | None]) -> Product:
        moved = [None if bias is None else bias.to(device, dtype) for bias in biases]
        return dense_product([weight.to(device).decode(dtype) for weight in weights], moved)

    return make


def _dense_bytes(subject: Subject, packed: Weights | None) -> int:
    """What the dense weights take beside the packed ones: layers, embeddings, head, and one matrix in float32 while it
    is decoded."""
    largest = max(weight.shape[0] * weight.shape[1] for parts in subject.layer.values() for weight in parts)
    element = subject.dtype.itemsize
    return element * packed_parameters(subject) + (0 if packed is None else _other_bytes(packed)) + 4 * largest


def packed_parameters(subject: Subject) -> int:
    """Weights of block 0's products, times the blocks: what the payload holds."""
    stored = sum(weight.nbytes() for parts in subject.layer.values() for weight in parts)
    weights = sum(weight.shape[0] * weight.shape[1] for parts in subject.layer.values() for weight in parts)
    return round(weights * subject.payload_bytes / stored)


def _packed_weights(spec: RuntimeSpec, subject: Subject) -> tuple[Weights, Bands | None]:
    make = packed_products(subject.device, subject.dtype)
    if spec.runtime != "banded":
        return subject.weights(make), None
    bands = Bands(spec.band or 1, subject.device)
    weights = subject.weights(make, bands.take)
    bands.start()
    return weights, bands


def _gate(subject: Subject, weights: Weights, bands: Bands | None, vectors: int) -> float:
    """The worst relative error of the products of block 0, fresh random inputs. Raises NumericalError above
    tolerance.

    vectors: as many as a decode step has; one vector and several are multiplied by different kernels.
    """
    worst, tolerance = 0.0, TOLERANCE[subject.dtype]
    if bands is not None:
        bands.before(0)
    for name, parts in subject.layer.items():
        product = weights.blocks[0].products[name]
        inputs = torch.randn(vectors, parts[0].shape[1]).to(subject.dtype)
        exact = torch.cat([_exact(inputs, weight.to(subject.device)) for weight in parts], dim=1)
        bias = getattr(product, "bias", None)
        if bias is not None:
            exact = exact + bias.double().cpu()
        found = product(inputs.to(subject.device)).double().cpu()
        error = float((found - exact).norm() / exact.norm())
        furthest = float((found - exact).abs().max() / exact.square().mean().sqrt())
        if not (error <= tolerance and furthest <= _FURTHEST * tolerance):
            raise NumericalError(
                f"{name}: relative error {error:.2e} of its product against decode(), {furthest:.2e} in one entry, "
                f"in {subject.dtype}"
            )
        worst = max(worst, error)
    return worst


def _exact(inputs: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """float64, a few rows at a time, where the weight is: [vectors, out_features] on the CPU."""
    decoded = weight.decode(torch.float32)
    exact = inputs.double().to(decoded.device)
    return torch.cat([exact @ rows.double().T for rows in decoded.split(2048)], dim=1).cpu()


def _add_arms(
    arms: dict[str, Stepper],
    absent: dict[str, str],
    name: str,
    weights: Weights,
    spec: DecodeSpec,
    prompt: torch.Tensor,
    bands: Bands | None,
) -> None:
    """The arm, on CUDA captured in a graph and without one; if it cannot be captured, `absent` says why."""
    cuda = prompt.device.type == "cuda"
    if cuda and bands is not None:
        absent[name] = f"bands are not captured in a graph; {name}-eager is this arm without one"
    else:
        try:
            arms[name] = Stepper(_decoder(weights, spec, bands), prompt, spec.tokens - 1, graph=cuda)
        except RuntimeError as error:
            # Without a graph it would take as much as soon as it ran, and the other arms' times would be lost with it.
            lost = isinstance(error, torch.OutOfMemoryError) and bool(arms)
            if not cuda or lost:
                raise
            absent[name] = f"not captured in a graph: {str(error).splitlines()[0]}"
    if cuda:
        arms[f"{name}-eager"] = Stepper(_decoder(weights, spec, bands), prompt, spec.tokens - 1)


def _add_dense(
    arms: dict[str, Stepper],
    absent: dict[str, str],
    subject: Subject,
    spec: DecodeSpec,
    prompt: torch.Tensor,
    phases: Phases,
) -> None:
    """The dense arms beside the packed ones. If memory gives out, nothing of them is left and `absent` says why: what
    they are compared with is worth a record. Raises torch.OutOfMemoryError where there is nothing else."""
    before = dict(arms)
    try:
        with phases.measure("build"):
            dense = subject.weights(dense_products(subject.device, subject.dtype))
        _add_arms(arms, absent, "dense", dense, spec, prompt, None)
    except torch.OutOfMemoryError as error:
        if not before:
            raise
        for name in arms.keys() - before.keys():
            del arms[name]
        absent["dense"] = f"does not fit: {str(error).splitlines()[0]}"


def _decoder(weights: Weights, spec: RuntimeSpec, bands: Bands | None) -> Decoder:
    length = -(-(spec.prompt + spec.tokens) // _CACHE_STEP) * _CACHE_STEP
    known = weights.architecture.positions
    return Decoder(weights, spec.batch, length if known is None else min(length, known), bands)


def _prompt(spec: RuntimeSpec, subject: Subject) -> torch.Tensor:
    drawn = torch.randint(0, _VOCABULARY, (spec.batch, spec.prompt), generator=torch.Generator().manual_seed(0))
    return drawn.to(subject.device)


def _band_times(bands: Bands, stepper: Stepper, times: ArmTimes, bandwidth: Bandwidth) -> BandTimes:
    """The copy of a layer at the measured rate of the bus, and a band's computation without copies: in a graph, which
    a step that copies nothing allows, or it would be the host's time for the launches of a band."""
    bands.frozen = True
    still = _captured(stepper)
    still.run()  # the first replay does not count
    alone = still.run()
    bands.frozen = False
    layers = len(stepper.decoder.weights.blocks)
    rate = bandwidth.host_to_device_gb_s or bandwidth.copy_gb_s
    a_step = sum(alone.steps) / len(alone.steps)
    return BandTimes(
        layers_per_band=bands.layers,
        layer_io_ms=1e3 * bands.host_bytes / layers / (rate * 1e9),
        band_decode_ms=1e3 * a_step * min(bands.layers, layers) / layers,
        host_bytes=bands.host_bytes,
        host_to_device_gb_s=rate,
    )


def _captured(stepper: Stepper) -> Stepper:
    """`stepper` with its step in a graph, or as it is where that cannot be captured."""
    try:
        return stepper.captured()
    except RuntimeError:
        return stepper


def _other_bytes(weights: Weights) -> int:
    """Embeddings, head (once where tied), norms, learned positions and biases."""
    found = [weights.embedding, weights.positions, weights.final_norm.weight, weights.final_norm.bias]
    if isinstance(weights.head, DenseProduct):
        found.append(weights.head.weight)
    for block in weights.blocks:
        for norm in (block.attention_norm, block.mlp_norm, *(block.head_norms or ())):
            found += [norm.weight, norm.bias]
        found += [getattr(product, "bias", None) for product in block.products.values()]
    distinct = {tensor.data_ptr(): tensor for tensor in found if tensor is not None}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def _setting(spec: RuntimeSpec) -> str:
    return f"batch {spec.batch}, prompt {spec.prompt}, {spec.tokens} tokens, {spec.runtime}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()
