"""Adapters through peft, checkpoints through Orbax, folders that are damaged."""

import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft as peft_library
import pytest
import torch
from conftest import mesh_of
from test_model_parity import batch, close, expected, make

from dail_jax import config as config_lib
from dail_jax.checkpoint import base, hf, peft, store
from dail_jax.errors import UserError
from dail_jax.model import lora as lora_lib
from dail_jax.model import transformer, weights

LORA = config_lib.LoraConfig(rank=3, alpha=6, targets=("q", "k", "v", "o", "gate", "up", "down"))


def opened(case, folder, mesh):
    theirs = make(case, folder)
    params, cfg = hf.load(folder, mesh, "float32")
    return folder, theirs, params, cfg


@pytest.fixture(scope="module")
def model(tmp_path_factory, one_device):
    return opened("qwen3", tmp_path_factory.mktemp("model") / "qwen3", one_device)


def noisy(cfg):
    """An adapter whose both sides are not zero."""
    fresh = lora_lib.init(jax.random.key(1), cfg, LORA)
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    return jax.tree.map(noise, fresh)


@pytest.fixture(scope="module")
def lora(model):
    return noisy(model[3])


def test_fresh_adapter_is_a_no_op(model):
    _, _, params, cfg = model
    tokens, positions = batch()
    with_it = transformer.encode(params, tokens, positions, cfg, lora=lora_lib.init(jax.random.key(2), cfg, LORA))
    without = transformer.encode(params, tokens, positions, cfg)
    assert (np.asarray(with_it) == np.asarray(without)).all()


@pytest.mark.parametrize("case", ["qwen3", "mistral", "smollm3", "olmo2", "olmo3", "gemma3", "phi3"])
def test_peft_loads_the_adapter_with_equal_logits(case, model, one_device, tmp_path):
    """Adapted and merged, and read again: the same pairs or, where a module holds several weights, the same function."""
    folder, theirs, params, cfg = model if case == "qwen3" else opened(case, tmp_path / case, one_device)
    lora = noisy(cfg)
    peft.save(tmp_path / "adapter", lora, cfg, LORA, str(folder))
    tokens, positions = batch()
    run = jax.jit(
        lambda lora: transformer.unembed(params, transformer.encode(params, tokens, positions, cfg, lora=lora))
    )
    adapted = peft_library.PeftModel.from_pretrained(type(theirs).from_pretrained(folder), tmp_path / "adapter").eval()
    want = expected(adapted, tokens, positions)
    assert close(run(lora), want, positions >= 0) < 1e-4
    plain = expected(theirs, tokens, positions)
    assert np.abs(want - plain).max() > 0.1 * np.abs(plain).max()
    again, settings = peft.load(tmp_path / "adapter", cfg, one_device)
    assert again.scale == lora.scale and settings.targets == LORA.targets
    if cfg.fused:
        assert settings.rank == 3 * LORA.rank and close(run(again), want, positions >= 0) < 1e-4
    else:
        assert settings == LORA and all(jax.tree.leaves(jax.tree.map(np.array_equal, again.tree, lora.tree)))
    merged = lora_lib.merge(params, lora, cfg)
    hf.save(tmp_path / "merged", merged, cfg, theirs.config.to_dict())
    loaded = type(theirs).from_pretrained(tmp_path / "merged").eval()
    assert close(expected(loaded, tokens, positions), want, positions >= 0) < 1e-4


def test_adapters_of_peft_on_modules_of_several_weights(one_device, tmp_path):
    folder, theirs, params, cfg = opened("phi3", tmp_path / "phi3", one_device)
    torch.manual_seed(0)
    config = peft_library.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft_library.get_peft_model(type(theirs).from_pretrained(folder), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    lora, settings = peft.load(tmp_path / "adapter", cfg, one_device)
    assert settings.targets == ("q", "k", "v", "down") and settings.rank == 3
    tokens, positions = batch()
    ours = transformer.unembed(params, transformer.encode(params, tokens, positions, cfg, lora=lora))
    assert close(ours, expected(adapted, tokens, positions), positions >= 0) < 1e-4


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("r", 4, "shape"),
        ("target_modules", ["q_proj"], "unexpected"),
        ("target_modules", ["qkv"], "qkv"),
        ("target_modules", ["q_proj", {}], "list of modules"),
        ("target_modules", "all-linear", "list of modules"),
        ("peft_type", "IA3", "'LORA'"),
        ("task_type", "SEQ_CLS", "task_type: got 'SEQ_CLS', want 'CAUSAL_LM'"),
        ("bias", "all", "bias: got 'all', want 'none'"),
        ("r", 0, "positive"),
        ("r", 3.0, "positive whole number"),
        ("r", 2.5, "positive whole number"),
        ("r", True, "positive whole number"),
        ("lora_alpha", 0, "positive number"),
        ("lora_alpha", "6", "positive number"),
        ("layers_to_transform", 0, "layers_to_transform: got 0, which is not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights: got 'pissa', which may change the base model"),
        ("init_lora_weights", "pissa_niter_4", "which may change the base model"),
        ("init_lora_weights", "olora", "which may change the base model"),
        ("init_lora_weights", "corda", "which may change the base model"),
        ("init_lora_weights", "loftq", "which may change the base model"),
        ("a_field_of_tomorrow", {"scale": 2}, "a_field_of_tomorrow: got .*, which is not supported"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(model, lora, one_device, tmp_path, field, value, words):
    peft.save(tmp_path / "a", lora, model[3], LORA, "base")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    (tmp_path / "a" / hf.MANIFEST).unlink()
    with pytest.raises(UserError, match=words):
        peft.load(tmp_path / "a", model[3], one_device)
    with pytest.raises(UserError, match="exists"):
        peft.save(tmp_path / "a", lora, model[3], LORA, "base")


VALUES = {bool: True, int: 4, str: "some", list: [1], dict: {"x": 1}}  # none of them a default


def test_every_field_of_peft_is_read_or_refused(model, lora, one_device, tmp_path):
    """As the installed version has them: its defaults load, and what it could change is refused by name."""
    peft.save(tmp_path / "a", lora, model[3], LORA, "base")
    (tmp_path / "a" / hf.MANIFEST).unlink()
    file = tmp_path / "a" / "adapter_config.json"
    ours = json.loads(file.read_text())
    config = peft_library.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=ours["target_modules"])
    config.save_pretrained(str(tmp_path / "theirs"))
    theirs = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    file.write_text(json.dumps(theirs))
    again, settings = peft.load(tmp_path / "a", model[3], one_device)
    assert settings == LORA and again.scale == lora.scale
    fields = {field.name for field in dataclasses.fields(peft_library.LoraConfig)}
    assert len(fields) > 30 and {"use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices"} < fields
    assert peft.INERT | peft.READ | peft.ONLY.keys() <= fields
    for name in fields - peft.INERT - peft.READ - peft.ONLY.keys():
        value = VALUES[type(theirs[name])] if theirs.get(name) is not None else [0]
        file.write_text(json.dumps({**theirs, name: value}))
        with pytest.raises(UserError, match=f"adapter_config.json:{name}: got .*, which is not supported") as error:
            peft.load(tmp_path / "a", model[3], one_device)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["qwen3", "phi3"])
def test_rank_stabilised_adapters_scale_as_peft_does(case, model, one_device, tmp_path):
    """Written by us and read by peft, read again, and merged by both; also where a module holds several weights."""
    folder, theirs, params, cfg = model if case == "qwen3" else opened(case, tmp_path / case, one_device)
    stable, lora = LORA.model_copy(update={"use_rslora": True}), noisy(cfg)
    assert lora_lib.init(jax.random.key(0), cfg, stable).scale == pytest.approx(3**0.5 * lora.scale)
    peft.save(tmp_path / "a", lora.replace(scale=stable.scale), cfg, stable, str(folder))
    again, settings = peft.load(tmp_path / "a", cfg, one_device)
    assert settings.use_rslora and again.scale == pytest.approx(stable.scale)
    assert settings == stable or cfg.fused
    tokens, positions = batch()
    adapted = peft_library.PeftModel.from_pretrained(type(theirs).from_pretrained(folder), tmp_path / "a").eval()
    assert adapted.peft_config["default"].use_rslora
    want = expected(adapted, tokens, positions)
    hidden = transformer.encode(params, tokens, positions, cfg, lora=again)
    assert close(transformer.unembed(params, hidden), want, positions >= 0) < 1e-4
    merged = transformer.encode(lora_lib.merge(params, again, cfg), tokens, positions, cfg)
    other = expected(adapted.merge_and_unload(), tokens, positions)
    assert close(transformer.unembed(params, merged), other, positions >= 0) < 1e-4
    assert close(want, other, positions >= 0) < 1e-4


def test_an_adapter_of_another_base_model_is_refused(model, lora, tmp_path):
    folder, _, params, cfg = model
    peft.save(tmp_path / "a", lora, cfg, LORA, str(folder))
    file = tmp_path / "a" / "adapter_config.json"
    ours = json.loads(file.read_text())
    base.save(tmp_path / "converted", params, folder)
    cached = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / "c1899de2"
    cached.mkdir(parents=True)
    for name, here in (
        (str(folder), folder),
        (str(folder), tmp_path / "converted"),
        ("org/QWEN3", folder),
        ("Qwen/Qwen3-0.6B", cached),
        (None, folder),
    ):
        file.write_text(json.dumps({**ours, "base_model_name_or_path": name}))
        peft.refuse_other_base(tmp_path / "a", here)
    for name, here in (("Qwen/Qwen3-8B", folder), ("Qwen/Qwen3-8B", cached), (str(folder), cached)):
        file.write_text(json.dumps({**ours, "base_model_name_or_path": name}))
        with pytest.raises(UserError, match=r"base_model_name_or_path: got an adapter of .* but the model is"):
            peft.refuse_other_base(tmp_path / "a", here)


def copy(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_sharded_folders_load_the_same(model, tmp_path, monkeypatch):
    _, theirs, params, cfg = model
    monkeypatch.setattr(hf, "SHARD_BYTES", 5_000)
    hf.save(tmp_path / "sharded", params, cfg, theirs.config.to_dict())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    mesh = mesh_of(1, 2, 2)
    again, _ = hf.load(tmp_path / "sharded", mesh, "float32")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
    assert again["layers"]["gate"].sharding.shard_shape((3, 24, 40)) == (3, 12, 20)
    tokens, positions = batch()
    their_view = type(theirs).from_pretrained(tmp_path / "sharded").eval()
    assert np.array_equal(expected(their_view, tokens, positions), expected(theirs, tokens, positions))


def test_converted_folder_is_the_same_model(model, tmp_path):
    folder, _, params, cfg = model
    base.save(tmp_path / "converted", params, folder)
    again, cfg_again = base.load(tmp_path / "converted", mesh_of(2, 2, 2), "float32")
    assert cfg_again == cfg and all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
    victim = max(
        (tmp_path / "converted" / base.PARAMS).rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        base.load(tmp_path / "converted", mesh_of(), "float32")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_nan(path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, path)


def drop(path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


DAMAGE = {
    "truncated": (truncate, "not a complete"),
    "nan": (flip_nan, "model.norm.weight.*NaN"),
    "missing": (drop, "missing tensors: model.norm.weight"),
    "lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid 1"), "not downloaded"),
    "page": (lambda p: p.write_text("<!doctype html>"), "not downloaded"),
    "pickle": (lambda p: p.rename(p.with_name("pytorch_model.bin")), "pickle"),
    "index": (
        lambda p: (
            p.rename(p.with_name("x.safetensors"))
            and p.with_name(hf.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../x.safetensors"}}))
        ),
        "plain name",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(model, tmp_path, one_device, kind):
    target = copy(model[0], tmp_path / "m")
    spoil, words = DAMAGE[kind]
    spoil(target / "model.safetensors")
    with pytest.raises(UserError, match=words) as error:
        hf.load(target, one_device, "float32")
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_noticed_by_the_manifest(model, tmp_path, one_device):
    _, theirs, params, cfg = model
    hf.save(tmp_path / "m", params, cfg, theirs.config.to_dict())
    file = tmp_path / "m" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        hf.load(tmp_path / "m", one_device, "float32")


def test_interrupted_save_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="cannot be written: disk full"):
        hf.save(tmp_path / "m", model[2], model[3], {})
    assert list(tmp_path.iterdir()) == []


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def test_store_keeps_the_newest_whole_checkpoint(tmp_path):
    state = {"a": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(4)}
    s = store.Store(tmp_path, keep=2)
    assert s.restore(abstract(state)) is None
    for step in (1, 2, 3):
        s.save(step, jax.tree.map(lambda x, step=step: x + step, state), {"data": {"at": step}})
    assert s.steps() == [2, 3]
    s.close()
    # A step without a manifest is a torn one; a stray folder is not a checkpoint.
    (tmp_path / "9").mkdir()
    s = store.Store(tmp_path, keep=2)
    step, got, progress = s.restore(abstract(state))
    assert step == 3 and progress == {"data": {"at": 3}} and (got["a"] == state["a"] + 3).all()
    # A damaged one is passed over.
    victim = max((tmp_path / "3").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    step, got, _ = s.restore(abstract(state))
    assert step == 2 and (got["a"] == state["a"] + 2).all()
    s.save(3, state, {})
    assert s.steps() == [2, 3]
    (tmp_path / "manifests" / "2.json").write_text("{}x")
    (tmp_path / "manifests" / "3.json").write_text("{}x")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        s.restore(abstract(state))
    s.close()


def test_saving_leaks_no_objects(tmp_path):
    """As many objects after ten more saves; benchmarks/leak.py measures memory over a thousand."""
    s, counts = store.Store(tmp_path, keep=1), []
    for step in range(1, 16):
        s.save(step, {"a": jnp.arange(6.0)}, {})
        gc.collect()
        counts.append(len(gc.get_objects()))
    s.close()
    assert counts[-1] - counts[4] < 120, counts  # 60, which end at 90; with the metrics of TensorStore 300, without end


def test_count_and_abstract_agree(model):
    cfg = model[3]
    shapes = weights.abstract(cfg, jnp.bfloat16, mesh_of(2, 2, 2))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == weights.count(cfg)
    assert torch.is_tensor(next(model[1].parameters()))
