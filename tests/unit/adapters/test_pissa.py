"""PiSSA against float64 references from the paper (arXiv 2404.02948), and all that must not be loaded."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from helpers import make_recipe, recipe_error, tiny_folder, tiny_layout
from safetensors.torch import load_file, save_file

from qhybrid.adapters.attach import adapted_modules, attach, attach_plain
from qhybrid.adapters.folder import load_weights, read_plain, read_principal_parts, save_adapter
from qhybrid.adapters.info import AdapterInfo, read_adapter
from qhybrid.adapters.pissa import distance_on_whole_base, principal_part, principal_parts
from qhybrid.adapters.plain import PlainModule
from qhybrid.base.load import keep_exact_on_cpu, load_base
from qhybrid.base.principal import PrincipalPart, parts_missing_in
from qhybrid.errors import AdapterError, LayoutError, ModelError
from qhybrid.recipe.schema import ModelSection, QuantizationSection

TOKENS = torch.arange(4, 36)[None]
NF4, NONE = QuantizationSection(), QuantizationSection(method="none")
RANK = 4
BANDS = [
    {"band": "a", "layers": "0-1", "rank": RANK, "alpha": 12, "init": "pissa"},  # s = 3
    {"band": "b", "layers": "2-3", "kind": "rslora", "rank": RANK, "alpha": RANK, "init": "pissa"},  # s = 2
    {"band": "c", "layers": "4", "kind": "dora", "rank": RANK, "alpha": 10, "init": "pissa"},  # s = 2.5
    {"band": "d", "layers": "5", "rank": RANK},
]
SCALINGS = {0: 3.0, 1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model in bf16 whose weights have a few large singular values, as trained ones do."""
    folder = tiny_folder(tmp_path_factory.mktemp("planted") / "base", intermediate_size=128)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "_proj" in name:
            left, right = (torch.randn(n, RANK, generator=generator) for n in value.shape)
            value += 0.04 * left @ right.T / RANK**0.5
    shutil.copytree(folder, folder.with_name("bf16"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    half = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(half, folder.with_name("bf16") / "model.safetensors", {"format": "pt"})
    return folder


def section(base, dtype="float32"):
    return ModelSection(path=str(base), dtype=dtype, adapter_dtype=dtype)


def layout_of(bands=BANDS):
    return tiny_layout(bands, intermediate_size=128)


def parts_of(base, layout=None, dtype=torch.float32, adapter_dtype=None):
    layout = layout or layout_of()
    return principal_parts(layout, base, dtype=dtype, adapter_dtype=adapter_dtype or dtype)


def pissa_model(base, quantization=NONE, dtype="float32", bands=BANDS):
    layout = layout_of(bands)
    parts = parts_of(base, layout, getattr(torch, dtype))
    loaded = load_base(section(base, dtype), quantization, without=parts)
    return attach(loaded, layout, dtype=getattr(torch, dtype)), layout


def weights_of(base):
    """Every weight as float64 by its module's name."""
    return {
        name.removesuffix(".weight"): value.double().numpy()
        for name, value in load_file(base / "model.safetensors").items()
    }


def best(weight: np.ndarray, rank: int) -> np.ndarray:
    """U_r·S_r·V_rᵀ."""
    u, sigma, v = np.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ v[:rank]


def relative(one, other) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


# ---- the method ----


def test_pissa_trains_the_principal_part_and_freezes_the_residual(base):
    """An article has it the other way round: it trains the residual, and the principal part stays as it is."""
    model, layout = pissa_model(base)
    whole = weights_of(base)
    for row, module in adapted_modules(model, layout):
        frozen, trained = (
            module.get_base_layer().weight,
            (module.lora_A["default"].weight, module.lora_B["default"].weight),
        )
        assert not frozen.requires_grad and all(factor.requires_grad for factor in trained)
        product = row.scaling * (trained[1].detach().double() @ trained[0].detach().double()).numpy()
        if row.band == "d":
            assert not product.any() and relative(frozen.double().numpy(), whole[row.module]) == 0
            continue
        assert row.scaling == pytest.approx(SCALINGS[row.layer])
        principal = best(whole[row.module], RANK)
        assert relative(product, principal) < 1e-4
        assert relative(frozen.double().numpy(), whole[row.module] - principal) < 1e-4
        # As in the paper, both factors have an equal share: B0ᵀ·B0 = A0·A0ᵀ = S_r / s.
        shares = [(trained[1].T @ trained[1]).detach(), (trained[0] @ trained[0].T).detach()]
        sigma = np.linalg.svd(whole[row.module], compute_uv=False)[:RANK] / row.scaling
        for share in shares:
            assert relative(share.double().numpy(), np.diag(sigma)) < 1e-4
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    pissa = [row.module for row in layout if row.init == "pissa"]
    for module in pissa:
        assert {f"base_model.model.{module}.lora_{part}.default.weight" for part in "AB"} <= changed
    assert not any("base_layer" in name for name in changed)


def test_at_the_start_the_function_is_that_of_the_whole_model(base):
    model, _ = pissa_model(base)
    with torch.no_grad():
        whole = load_base(section(base), NONE)(TOKENS).logits
        assert (model(TOKENS).logits - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_on_nf4_the_start_is_the_quantised_residual_and_the_principal_part(base):
    """A model whose weights are put together here, with bitsandbytes' own NF4, computes the same."""
    model, layout = pissa_model(base, NF4)
    reference = load_base(section(base), NONE)
    rows = {row.module: row for row in layout}
    for name, linear in reference.named_modules():
        if not name.endswith("_proj"):
            continue
        weight, part = linear.weight.data, np.zeros(())
        if rows[name].init == "pissa":
            layer = model.get_base_model().get_submodule(name)
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            part = (rows[name].scaling * b @ a).detach()
            weight = (weight.double() - part).float()
        packed = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        linear.weight.data = (dequantize_4bit(*packed).double() + part).float()
    with torch.no_grad():
        ours, theirs = model(TOKENS).logits, reference(TOKENS).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_the_start_is_nearer_to_the_16_bit_model_than_nf4_is(base):
    """The paper's point for 4 bits: what is quantised is smaller."""
    model, layout = pissa_model(base, NF4, bands=[{"rank": RANK, "init": "pissa"}])
    with torch.no_grad():
        whole = load_base(section(base), NONE)(TOKENS).logits
        qlora = load_base(section(base), NF4)
        keep_exact_on_cpu(qlora)
        errors = [float((logits - whole).norm()) for logits in (model(TOKENS).logits, qlora(TOKENS).logits)]
    assert errors[0] < 0.75 * errors[1]
    for row, module in adapted_modules(model, layout):
        layer, weight = module.get_base_layer().weight, weights_of(base)[row.module]
        start = dequantize_4bit(layer.data, layer.quant_state) + row.scaling * (
            module.lora_B["default"].weight @ module.lora_A["default"].weight
        )
        own = qlora.get_submodule(row.module).weight
        plain = dequantize_4bit(own.data, own.quant_state)
        assert relative(start.detach().numpy(), weight) < relative(plain.numpy(), weight)


def test_magnitudes_start_at_the_norms_of_what_the_layer_multiplies_with(base):
    """W + s·B0·A0 of the rounded residual, not of the residual alone, which would scale the layer down."""
    for quantization in (NONE, NF4):
        model, layout = pissa_model(base, quantization)
        for row, module in adapted_modules(model, layout):
            if row.kind != "dora":
                continue
            layer = module.get_base_layer().weight
            frozen = layer if quantization is NONE else dequantize_4bit(layer.data, layer.quant_state)
            product = module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()
            norms = (frozen.double() + row.scaling * product).norm(dim=1)
            magnitude = module.lora_magnitude_vector["default"].weight.double()
            assert (magnitude / norms - 1).abs().max() < 1e-5
            assert (magnitude / frozen.double().norm(dim=1) - 1).abs().max() > 0.1


# ---- the decomposition ----


@pytest.mark.parametrize("shape", [(576, 192), (192, 576), (640, 640)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])  # of the singular values: σ_i = i^-decay
def test_the_fast_decomposition_is_nearly_the_best(shape, decay):
    """‖W − s·B0·A0‖ against the least there is (Eckart and Young), also where the spectrum is flat."""
    generator = torch.Generator().manual_seed(1)
    side = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, side, generator=generator).double()).Q for n in shape)
    sigma = torch.arange(1, side + 1).double() ** -decay
    weight = ((u * sigma) @ v.T).float()
    for rank in (4, 16, 64):  # the last is decomposed in full
        part = principal_part(weight, rank, 2.0, dtype=torch.float32)
        assert part.a.shape == (rank, shape[1]) and part.b.shape == (shape[0], rank)
        error = float((weight.double() - 2.0 * part.b.double() @ part.a.double()).norm())
        assert error <= 1.003 * float(sigma[rank:].norm())


def test_the_start_depends_on_nothing_but_the_weight(base):
    """Not on torch's generator, the order of the modules, or what came before; and it moves no generator."""
    layout = layout_of()
    torch.manual_seed(1)
    first = parts_of(base, layout)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    backwards = dataclasses.replace(layout, rows=tuple(reversed(layout.rows)))
    second = parts_of(base, backwards)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys() and len(first) == 5 * 7
    for name, part in first.items():
        assert torch.equal(part.a, second[name].a) and torch.equal(part.b, second[name].b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_loads_give_the_same_bytes_on_any_number_of_threads(base, dtype):
    folder = base.with_name("bf16") if dtype == "bfloat16" else base
    bytes_of = []
    parts = parts_of(folder, dtype=getattr(torch, dtype))
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            loaded = load_base(section(folder, dtype), NF4, without=parts)
        finally:
            torch.set_num_threads(before)
        weights = {name: module.weight for name, module in loaded.named_modules() if name.endswith("_proj")}
        bytes_of.append(
            {
                name: (weight.data.numpy().tobytes(), weight.quant_state.absmax.numpy().tobytes())
                for name, weight in weights.items()
            }
        )
    assert bytes_of[0] == bytes_of[1] and len(bytes_of[0]) == 42


def test_rows_of_the_residual_are_those_of_the_whole(base):
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].bfloat16()
    part = principal_part(weight, RANK, 3.0, dtype=torch.bfloat16)
    whole = part.residual(weight)
    exact = weight.double() - 3.0 * part.b.double() @ part.a.double()
    assert torch.equal(whole, exact.bfloat16()) and whole.dtype == torch.bfloat16
    pieces = torch.cat([part.residual(weight[start : start + 17], start) for start in range(0, 128, 17)])
    assert torch.equal(pieces, whole)
    part.take_out_of(weight)
    assert torch.equal(weight, whole)


# ---- the forms of the result ----


def randomized(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A trained adapter of all kinds in fp32 on the unquantised base: its folder, and its logits."""
    model, layout = pissa_model(base)
    randomized(model)
    info = AdapterInfo(str(base), None, "none", True, "float32", "float32", "sdpa")
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(model, layout, info, folder)
    with torch.no_grad():
        return folder, model(TOKENS).logits


def test_on_the_whole_base_it_is_lora_of_twice_the_rank(saved, base):
    folder, logits = saved
    adapter = read_plain(folder)
    whole = weights_of(base)
    tensors = load_file(folder / "adapter.safetensors")
    for module in adapter:
        a, b = (tensors[f"{module.module}.lora_{part}"].double().numpy() for part in "AB")
        principal = best(whole[module.module], RANK) if module.num_principal else 0
        change = module.scaling * (b @ a) - principal
        assert relative(module.delta().double().numpy(), change) < 1e-3
        assert module.rank == (2 * RANK if module.num_principal else RANK)
    with torch.no_grad():
        ours = attach_plain(load_base(section(base), NONE), adapter.modules, dtype=torch.float32)(TOKENS).logits
        parts = read_principal_parts(folder, read_adapter(folder)[0])
        rest = load_base(section(base), NONE, without=parts)
        native = attach_plain(rest, adapter.modules, dtype=torch.float32)(TOKENS).logits
        wrong = attach_plain(
            load_base(section(base), NONE), [module.native for module in adapter], dtype=torch.float32
        )(TOKENS).logits
    assert (ours - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(native, logits)
    assert (wrong - logits).abs().max() > 0.1 * logits.abs().max()  # the principal part twice


def test_the_distance_on_the_whole_base_is_that_of_the_weights(saved, base):
    folder, _ = saved
    parts = read_plain(folder).principal_parts
    moved = own = total = 0.0
    for name, part in parts.items():
        weight = torch.from_numpy(weights_of(base)[name])
        principal = part.scaling * part.b.double() @ part.a.double()
        seen = [
            dequantize_4bit(*quantize_4bit(w.float(), blocksize=64, compress_statistics=True, quant_type="nf4"))
            for w in (weight, weight - principal)
        ]
        moved += float((seen[0].double() - principal - seen[1].double()).square().sum())
        own += float((seen[0].double() - weight).square().sum())
        total += float(weight.square().sum())
    found = distance_on_whole_base(parts, base, torch.float32, NF4)
    assert found == pytest.approx(((moved / total) ** 0.5, (own / total) ** 0.5), rel=1e-4)
    assert distance_on_whole_base(parts, base, torch.float32, NONE)[0] < 1e-6


def test_a_layer_knows_what_was_taken_out_of_it(base):
    parts = parts_of(base)
    loaded = load_base(section(base), NF4, without=parts)
    assert parts_missing_in(loaded).keys() == parts.keys()
    model = attach(loaded, layout_of(), dtype=torch.float32)
    assert parts_missing_in(model.get_base_model()).keys() == parts.keys()
    assert parts_missing_in(load_base(section(base), NF4)) == {}


def test_terms_that_were_added_since_are_read(saved, base, tmp_path):
    """A module of a higher rank than what it began with: the new terms are as in LoRA."""
    folder, logits = saved
    layout, info = read_adapter(folder)
    rows = [
        dataclasses.replace(row, rank=6, target_rank=6, alpha=row.scaling * 6) if row.init == "pissa" else row
        for row in layout
    ]
    wider = dataclasses.replace(layout, rows=tuple(rows))
    model = attach(
        load_base(section(base), NONE, without=read_principal_parts(folder, layout)), wider, dtype=torch.float32
    )
    tensors = load_file(folder / "adapter.safetensors")
    with torch.no_grad():
        for row, module in adapted_modules(model, wider):
            if row.init == "pissa":
                assert module.lora_A["default"].weight[RANK:].any()
                assert not module.lora_B["default"].weight[:, RANK:].any()
            a, b = (tensors[f"{row.module}.lora_{part}"] for part in "AB")
            module.lora_A["default"].weight[: len(a)] = a
            module.lora_B["default"].weight[:, : len(a)] = b
            if row.kind == "dora":
                module.lora_magnitude_vector["default"].weight.copy_(tensors[f"{row.module}.lora_magnitude"])
        assert (model(TOKENS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    save_adapter(model, wider, info, tmp_path / "wider")
    again = read_plain(tmp_path / "wider")
    assert {(module.rank, module.num_principal) for module in again} == {(6 + RANK, RANK), (RANK, 0)}
    with torch.no_grad():
        ours = attach_plain(load_base(section(base), NONE), again.modules, dtype=torch.float32)(TOKENS).logits
        assert (ours - logits).abs().max() <= 1e-5 * logits.abs().max()


# ---- what is refused ----


def test_an_adapter_is_not_put_on_a_base_of_another(saved, base):
    folder, _ = saved
    adapter, (layout, _) = read_plain(folder), read_adapter(folder)
    parts = read_principal_parts(folder, layout)
    name = next(iter(parts))
    other = PrincipalPart(parts[name].a * 1.001, parts[name].b, parts[name].scaling)
    for wrong in ({**parts, name: other}, {k: v for k, v in parts.items() if k != name}):
        rest = load_base(section(base), NONE, without=wrong)
        with pytest.raises(AdapterError, match="without the principal parts of another"):
            attach_plain(rest, adapter.modules, dtype=torch.float32)
    rest = load_base(section(base), NONE, without={**parts, name: other})
    with pytest.raises(AdapterError, match="not without the principal parts that this adapter stores"):
        load_weights(attach(rest, layout, dtype=torch.float32), layout, folder)
    plain = [module for module in adapter if not module.num_principal]
    with pytest.raises(AdapterError, match="of another"):
        attach_plain(load_base(section(base), NONE, without=parts), plain, dtype=torch.float32)
    with pytest.raises(AssertionError, match="loaded for another layout"):
        attach(load_base(section(base), NONE), layout, dtype=torch.float32)


def test_damaged_folders_are_refused(saved, tmp_path):
    folder, _ = saved
    for change in ("missing", "shape", "values"):
        copy = tmp_path / change
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "adapter.safetensors")
        name = "model.layers.0.self_attn.q_proj.lora_A0"
        if change == "missing":
            del tensors[name]
        elif change == "shape":
            tensors[name] = tensors[name][:, :-1].contiguous()
        else:
            tensors[name][0, 0] = float("nan")
        save_file(tensors, copy / "adapter.safetensors", {"format": "pt"})
        with pytest.raises(AdapterError, match=r"lora_A0|not finite"):
            read_plain(copy)


def test_parts_of_another_model_are_refused(base):
    parts = parts_of(base)
    name = next(iter(parts))
    narrow = PrincipalPart(parts[name].a[:, :-1], parts[name].b, parts[name].scaling)
    for wrong in ({name: narrow}, {"model.layers.9.self_attn.q_proj": parts[name]}):
        with pytest.raises(ModelError, match="in the base model and"):
            load_base(section(base), NONE, without=wrong)


def test_weights_without_a_principal_part_are_refused(base, tmp_path):
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(40, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    with pytest.raises(ModelError, match="up of the base model has rank 3, and PiSSA is to train 4") as caught:
        principal_part(thin, 4, 1.0, dtype=torch.float32, name="up")
    assert "at most 3" in caught.value.hint
    with pytest.raises(ModelError, match="rank 0"):
        principal_part(torch.zeros(40, 30), 4, 1.0, dtype=torch.float32)
    thin[0, 0] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        principal_part(thin, 4, 1.0, dtype=torch.float32)
    stored = tmp_path / "stored"
    shutil.copytree(base, stored)
    config = (stored / "config.json").read_text()
    (stored / "config.json").write_text(
        config.replace("{", '{"quantization_config": {"load_in_4bit": true, "quant_method": "bitsandbytes"},', 1)
    )
    with pytest.raises(ModelError, match="stored quantised, and PiSSA"):
        parts_of(stored)
    with pytest.raises(ModelError, match="stored quantised, and PiSSA"):
        load_base(section(stored), NF4, without=parts_of(base))


def test_recipes_that_make_no_sense_are_refused():
    text = "model: {path: m}\nadapters: [{%s}]\ndata: {sources: rows.jsonl}\noutput_dir: out\n"
    assert "init has no effect on adalora" in recipe_error(text % "kind: adalora, init: pissa")
    assert "pissa needs dropout 0" in recipe_error(text % "init: pissa, dropout: 0.1")
    assert "did you mean 'pissa'?" in recipe_error(text % "init: pisa")
    with pytest.raises(LayoutError, match="above 32, the smaller side"):
        tiny_layout([{"rank": 40, "init": "pissa"}])
    assert make_recipe(adapters=[{"init_lora_weights": "pissa", "rank": 4}]).adapters[0].init == "pissa"


def test_the_plan_is_that_of_lora_but_for_what_is_stored():
    from helpers import TINY

    from qhybrid.architecture.spec import spec_from_config
    from qhybrid.planner.plan import Budget, make_plan

    spec = spec_from_config(TINY)
    plain, pissa = (
        make_plan(make_recipe(adapters=[{"rank": 4, "init": init}]), spec, Budget(None), device="cuda")
        for init in ("kaiming", "pissa")
    )
    stored = plain.layout.num_parameters * 4
    assert pissa.layout.num_parameters == plain.layout.num_parameters
    assert (pissa.allocated, pissa.needed) == (plain.allocated, plain.needed)
    assert (pissa.checkpoint - plain.checkpoint, pissa.host - plain.host) == (stored, stored)


def test_a_plain_module_keeps_its_two_forms_apart():
    a, b = torch.randn(6, 5), torch.randn(4, 6)
    module = PlainModule("m", a, b, 2.0, num_principal=2)
    assert module.native.rank == 4 and module.principal.a.shape == (2, 5)
    rest = module.native.delta() - 2.0 * module.principal.b @ module.principal.a
    torch.testing.assert_close(rest, module.delta())
    assert PlainModule("m", a, b, 2.0).principal is None
