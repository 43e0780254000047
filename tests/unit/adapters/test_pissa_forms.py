"""What is saved of PiSSA: its forms on the whole base and on its own, and all that must not be loaded."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from helpers import make_recipe, recipe_error, tiny_layout
from pissa_cases import (
    NF4,
    NONE,
    RANK,
    TOKENS,
    best,
    layout_of,
    parts_of,
    pissa_model,
    relative,
    section,
    weights_of,
)
from safetensors.torch import load_file, save_file

from qhybrid.adapters.attach import adapted_modules, attach, attach_plain
from qhybrid.adapters.folder import load_weights, read_plain, read_principal_parts, save_adapter
from qhybrid.adapters.info import AdapterInfo, read_adapter
from qhybrid.adapters.pissa import distance_on_whole_base, principal_part
from qhybrid.adapters.plain import PlainModule
from qhybrid.base.load import load_base
from qhybrid.base.principal import PrincipalPart, parts_missing_in
from qhybrid.errors import AdapterError, LayoutError, ModelError


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
