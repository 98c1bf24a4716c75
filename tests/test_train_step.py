"""One device, eight devices, micro-batches, cached references: the same training."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from dail_jax import config as config_lib
from dail_jax import mesh as mesh_lib
from dail_jax.data import batches
from dail_jax.errors import UserError
from dail_jax.model import families, transformer, weights
from dail_jax.model import lora as lora_lib
from dail_jax.train import loop, methods, optimizer, references, step

CFG = families.ModelConfig(
    "qwen3",
    V=40,
    D=16,
    N=8,
    K=8,
    H=4,
    F=24,
    layers=(families.Layer(families.Rope(10_000.0)),) * 2,
    norm_eps=1e-6,
    tied=True,
    qk_norm="head",
    qkv_bias=False,
    max_positions=512,
)
ROLES = ("student", "privileged", "negative")


def settings(**kw):
    return config_lib.Train(
        **{
            "batch_size": 8,
            "bucket": 32,
            "chunk": 64,
            "epochs": 4,
            "remat": "none",
            "lora": {"rank": 4, "alpha": 8},
            "optimizer": {"learning_rate": 1e-2},
            **kw,
        }
    )


@pytest.fixture(scope="module")
def params():
    return weights.init(jax.random.key(0), CFG, std=0.3)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(1, 40, n).tolist())  # noqa: E731
    return [
        batches.Example(
            f"e{i}", {r: draw(rng.integers(3, 8) + 4 * j) for j, r in enumerate(ROLES)}, draw(rng.integers(2, 20))
        )
        for i in range(37)
    ]


def train(params, examples, cfg, mesh, steps=20, cached=None, spoil=None):
    """(losses, final LoRA) after some updates."""
    with jax.set_mesh(mesh):
        params = jax.device_put(params, weights.shardings(CFG, mesh))
        plan = batches.Plan(examples, cfg.batch_size, cfg.epochs, 0)
        rows = cfg.batch_size // cfg.accumulate
        method = methods.find(cfg)
        assemble = batches.Assemble(
            examples,
            cfg.bucket,
            cfg.accumulate,
            mesh_lib.local_rows(mesh, rows),
            ("student",) if cached else method.prompted,
            method.roles if cached else (),
            cached,
        )
        tx = optimizer.adamw(cfg.optimizer, len(plan))
        layout = step.shardings(CFG, cfg, tx, mesh)
        state = step.init(jax.random.key(1), CFG, cfg, tx, mesh)
        update = step.make_update(step.spec_of(CFG, cfg), tx, layout)
        losses = []
        feed = batches.iterator(plan, assemble, 0)
        for i in range(steps):
            batch = next(feed)
            if spoil is not None and i in spoil:
                batch = {**batch, "student_positions": batch["student_positions"] + 2**30}
                params_now = jax.tree.map(lambda w: w * jnp.nan, params)
            else:
                params_now = params
            state, out = update(params_now, state, mesh_lib.to_devices(batch, mesh, rows))
            losses.append({k: np.asarray(v) for k, v in out.items()})
        return losses, jax.device_get(state)


@pytest.fixture(scope="module")
def reference(params, examples):
    return train(params, examples, settings(), mesh_of())


def close(a, b, tolerance=1e-5):
    for x, y in zip(a[0], b[0], strict=True):
        np.testing.assert_allclose(x["loss"], y["loss"], rtol=tolerance, atol=tolerance)
    diff = jax.tree.map(lambda x, y: np.abs(x - y).max(), a[1].lora, b[1].lora)
    assert max(jax.tree.leaves(diff)) < 20 * tolerance  # parameters of order 0.1, after 20 Adam steps


def test_few_batches_are_made_before_they_are_asked_for(examples):
    made = []

    class Counted(batches.Assemble):
        def map(self, element):
            made.append(element)
            return super().map(element)

    plan = batches.Plan(examples, 4, 20, 0)
    feed = batches.iterator(plan, Counted(examples, 8, 1, np.arange(4), ("student",)), 0)
    ahead = [len(made) - taken for taken, _ in enumerate(feed, 1)]
    feed.close()
    assert len(ahead) == len(made) == 200 and max(ahead) <= 2 * batches.AHEAD  # those that are ready, or being made


def test_loss_falls_and_excess_is_not_negative(reference):
    losses = reference[0]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert all(x["excess"] > -1e-4 and x["finite"] for x in losses)
    assert losses[0]["kl_privileged"] > 0 and losses[0]["kl_negative"] > 0


@pytest.mark.parametrize("shape", [(1, 8, 1), (4, 1, 2), (2, 2, 2)], ids=str)
def test_eight_devices_equal_one(params, examples, reference, shape):
    close(train(params, examples, settings(), mesh_of(*shape)), reference)


def test_micro_batches_equal_one_batch(params, examples, reference):
    close(train(params, examples, settings(accumulate=4), mesh_of(2, 1, 1)), reference)


def test_cached_references_equal_computed_ones(params, examples, reference, tmp_path, monkeypatch):
    mesh, cfg, make, shapes = mesh_of(), settings(), step.make_states, set()

    def recording(mesh):
        states = make(mesh)
        return lambda *args: shapes.add((args[4].shape, args[6])) or states(*args)

    monkeypatch.setattr(step, "make_states", recording)
    with jax.set_mesh(mesh):
        spec = step.spec_of(CFG, cfg)
        made = references.compute(tmp_path, "key", spec, params, mesh, examples, 8, bucket=4, most=2)
    assert len(shapes) == 2  # programs, for both roles

    def load(key):
        return references.load(tmp_path, key, examples, CFG.D, jnp.float32)

    cached = load("key")
    assert load("other") is None and cached.parts == made.parts
    close(train(params, examples, cfg, mesh, cached=cached), reference)
    data = (tmp_path / "negative.bin").read_bytes()
    (tmp_path / "negative.bin").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert load("key") is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mean_of_sequences_is_exact(params, examples, accumulate):
    """Eight devices and micro-batches, in which the last update of an epoch leaves rows empty: the same as one device."""
    cfg = settings(reduce="sequence")
    want = train(params, examples, cfg, mesh_of(), steps=5)
    got = train(params, examples, settings(reduce="sequence", accumulate=accumulate), mesh_of(2, 2, 2), steps=5)
    close(got, want)
    assert [x["tokens"] for x in got[0]] == [x["tokens"] for x in want[0]]


@pytest.mark.parametrize("reduce", ["token", "sequence"])
def test_the_loss_is_that_of_every_response_token(params, examples, reduce):
    """Against the paper's formula over each example alone: no padding, no batch, no chunks."""
    cfg = settings(reduce=reduce, batch_size=4)
    out, _ = train(params, examples, cfg, mesh_of(), steps=1)
    chosen = batches.Plan(examples, cfg.batch_size, cfg.epochs, 0)[0]
    means, lengths = [], []
    for i in chosen[chosen >= 0]:
        e = examples[i]
        log = {}
        for role in ROLES:
            ids = np.array([[*e.prompts[role], *e.response]], np.int32)
            hidden = transformer.encode(params, ids, np.arange(ids.shape[1])[None], CFG)
            n = len(e.prompts[role])
            log[role] = jax.nn.log_softmax(transformer.unembed(params, hidden[0, n - 1 : n - 1 + len(e.response)]))
        m, p, q = (log[r] for r in ROLES)
        means.append(float((jnp.exp(m) * ((m - p) - 0.1 * (m - q))).sum(-1).mean()))
        lengths.append(len(e.response))
    want = np.average(means, weights=lengths if reduce == "token" else None)
    assert abs(np.mean(means) / np.average(means, weights=lengths) - 1) > 0.01
    np.testing.assert_allclose(out[0]["loss"], want, rtol=1e-5)
    assert out[0]["tokens"] == sum(lengths)


def test_an_update_that_is_not_finite_changes_nothing(params, examples):
    before = train(params, examples, settings(), mesh_of(), steps=3)
    after = train(params, examples, settings(), mesh_of(), steps=4, spoil={3})
    assert not after[0][3]["finite"] and after[0][3]["bad_rows"].any()
    assert after[1].skipped == 1 and after[1].step == 4
    same = jax.tree.map(np.array_equal, (before[1].lora, before[1].opt_state), (after[1].lora, after[1].opt_state))
    assert all(jax.tree.leaves(same))


def test_the_rows_that_are_not_finite_are_named(params, examples):
    """A state of one example is spoilt, here a reference's: its row stands out, and no other."""

    def spoilt(role, index):
        states = np.ones((len(examples[index].response), CFG.D), np.float32)
        return states * np.nan if (role, index) == ("negative", 5) else states

    cfg = settings()
    losses, state = train(params, examples, cfg, mesh_of(data=2), steps=5, cached=spoilt)
    plan = batches.Plan(examples, cfg.batch_size, cfg.epochs, 0)
    (number,) = [i for i in range(5) if 5 in plan[i]]
    assert [bool(out["finite"]) for out in losses] == [i != number for i in range(5)] and state.step == 5
    names = np.array([e.name for e in examples])[plan[number].reshape(cfg.accumulate, -1)]
    assert loop.culprits(names, losses[number]["bad_rows"]) == ["e5"]
    everyone = loop.culprits(np.where(names == "e5", "", names), np.zeros(names.shape, bool))
    assert len(everyone) == 7 and "e5" not in everyone


@pytest.mark.parametrize("objective", ["nll", "sft"])
def test_likelihood_objectives(params, examples, objective):
    losses, state = train(params, examples, settings(objective=objective), mesh_of(2, 2, 2))
    alone, other = train(params, examples, settings(objective=objective), mesh_of())
    close((losses, state), (alone, other))
    assert losses[-1]["nll"] < losses[0]["nll"]


def test_merged_weights_equal_the_adapter(params, reference):
    lora = jax.tree.map(jnp.asarray, reference[1].lora)
    ids = np.arange(1, 13, dtype=np.int32)[None]
    with_adapter = transformer.encode(params, ids, np.arange(12)[None], CFG, lora=lora)
    merged = transformer.encode(lora_lib.merge(params, lora, CFG), ids, np.arange(12)[None], CFG)
    assert np.abs(with_adapter - merged).max() < 1e-4
    untouched = transformer.encode(params, ids, np.arange(12)[None], CFG)
    assert np.abs(with_adapter - untouched).max() > 1e-2


@pytest.mark.parametrize(("batch", "shape", "word"), [(6, (4, 1, 1), "multiple"), (8, (1, 1, 3), "multiple")])
def test_what_does_not_divide_is_said_before_compiling(params, examples, batch, shape, word):
    with pytest.raises(UserError, match=word):
        train(params, examples, settings(batch_size=batch), mesh_of(*shape), steps=1)


def test_plan_is_a_pure_function_and_pads_little(examples):
    plan, again = (batches.Plan(examples, 8, 3, 5) for _ in range(2))
    assert len(plan) == 15
    for epoch in range(3):
        seen = np.concatenate([plan[epoch * 5 + i] for i in range(5)])
        assert sorted(seen[seen >= 0]) == list(range(37))
    assert all((plan[i] == again[i]).all() for i in range(15))
    assert not all((plan[i] == plan[5 + i]).all() for i in range(5))
    for bucket, most in ((1, 0.2), (16, 0.5)):
        assemble = batches.Assemble(examples, bucket, 1, np.arange(8), ROLES)
        positions = [assemble.map(plan[i])["student_positions"] for i in range(5)]
        padding = sum((x < 0).sum() for x in positions) / sum(x.size for x in positions)
        assert batches.padding_share(plan, assemble) == pytest.approx(padding) and padding < most


def test_chosen_widths_pad_least():
    """Against every subset of the widths; with room for all of them, they are all of them."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 150, 60).tolist()
    found = sorted({batches.pad(n, 16) for n in lengths})
    assert batches.chosen_widths(lengths, 16, 99) == tuple(found) and len(found) == 10
    padded = lambda widths: sum(min(w for w in widths if w >= n) for n in lengths)  # noqa: E731
    for most in range(1, 10):
        got = batches.chosen_widths(lengths, 16, most)
        subsets = itertools.combinations(found[:-1], most - 1)
        assert len(got) == most and padded(got) == min(padded((*one, found[-1])) for one in subsets)


def test_long_traces_take_few_programs_and_little_padding():
    """160 updates of 16 traces of up to 2,048 tokens: as many shapes as asked for, at most 25% padding."""
    rng = np.random.default_rng(5)
    lengths = np.clip(rng.exponential(900, 2560), 20, 2048).astype(int)
    shown = {"student": 60, "privileged": 420, "negative": 180}  # the shortest prompts
    examples = [
        batches.Example(f"e{i}", {r: (1,) * (n + rng.integers(n)) for r, n in shown.items()}, (1,) * n_response)
        for i, n_response in enumerate(lengths.tolist())
    ]
    plan, most = batches.Plan(examples, 16, 1, 0), config_lib.Train().shapes
    counts, shares = [], []
    for roles in (("student",), ROLES):
        assemble = batches.Assemble(examples, 64, 1, np.arange(16), roles, widths=plan.widths(64, most))
        shapes = [assemble.shapes(plan[i][plan[i] >= 0]) for i in range(len(plan))]
        counts.append(len({(t, *widths.values()) for t, widths in shapes}))
        shares.append(batches.padding_share(plan, assemble))
    assert (len(plan), counts) == (160, [8, 8]) and max(shares) < 0.25
    orders, widths = references.schedule(examples, ROLES[1:], 16, 64, most)
    used, total = 0, 0
    for role, order in orders.items():
        assert sorted(order[order >= 0]) == list(range(2560))
        for chosen in order:
            rows = [len(examples[i].prompts[role]) + len(examples[i].response) for i in chosen if i >= 0]
            used, total = used + sum(rows), total + 16 * min(w for w in widths if w >= max(rows))
    assert len(widths) == 8 and 1 - used / total < 0.25
    assert len(batches.chosen_widths(plan.lengths[plan.lengths > 0], 64, 99)) > 30  # without a choice


def test_rows_end_in_one_column_and_a_width_has_one_shape():
    rng = np.random.default_rng(3)
    draw = lambda low, high: tuple(rng.integers(1, 40, rng.integers(low, high)).tolist())  # noqa: E731
    examples = [batches.Example(f"e{i}", {r: draw(3, 90) for r in ROLES}, draw(2, 120)) for i in range(300)]
    plan, shapes = batches.Plan(examples, 8, 1, 0), {}
    widths = plan.widths(32, 5)
    assemble = batches.Assemble(examples, 32, 1, np.arange(8), ROLES, widths=widths)
    for i in range(len(plan)):
        batch = assemble.map(plan[i])
        bucket = min(width for width in widths if width >= plan.lengths[plan[i][plan[i] >= 0]].max())
        shape = tuple(sorted((name, x.shape) for name, x in batch.items()))
        assert shapes.setdefault(bucket, shape) == shape
        assert batch["student_tokens"].shape[-1] > batch["mask"].shape[-1]
        for row, index in enumerate(plan[i][plan[i] >= 0]):
            e = examples[index]
            assert batch["targets"][0, row][batch["mask"][0, row]].tolist() == list(e.response)
            for role in ROLES:
                tokens, at = batch[f"{role}_tokens"][0, row], batch[f"{role}_positions"][0, row]
                assert tokens[at >= 0].tolist() == [*e.prompts[role], *e.response]
                assert at[-len(e.response) :].tolist() == list(range(len(e.prompts[role]), at[-1] + 1))
    assert tuple(sorted(shapes)) == widths and len(widths) == 5
    assert batches.padding_share(plan, assemble) < 0.25
