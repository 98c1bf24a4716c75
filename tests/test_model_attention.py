"""cuDNN's attention, of which everything but its kernel runs here: rows, masks and devices around it, and who takes it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of

from dail_jax.model import attention

T = 37
REAL = ((5, T), (0, 29), (4, 30), (9, 9), (0, T))  # of each row, where its real tokens start and end


@pytest.fixture
def kernel(monkeypatch):
    """Puts an einsum of JAX's in the kernel's place that promises as little: NaN at padding, in outputs and gradients.

    The fixture is the list of the shapes that the kernel was given for q and k.
    """
    given, reference = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, *, query_seq_lengths, key_value_seq_lengths, implementation, **settings):
        assert implementation == "cudnn" and settings["is_causal"] and query_seq_lengths is key_value_seq_lengths
        assert query_seq_lengths.shape == q.shape[:1]
        given.append((q.shape, k.shape))

        def only(x, lengths, other):
            return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None, None], x, other)

        def exact(lengths, *qkv):
            both = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
            qkv = (only(x, lengths, 0) for x in qkv)
            return only(reference(*qkv, **settings, **both, implementation="xla"), lengths, 0)

        @jax.custom_vjp
        def run(lengths, *qkv):
            return only(exact(lengths, *qkv), lengths, jnp.nan)

        def backward(kept, g):
            lengths, *qkv = kept
            back = jax.vjp(lambda *x: exact(lengths, *x), *qkv)[1]
            return None, *(only(x, lengths, jnp.nan) for x in back(only(g, lengths, 0)))

        run.defvjp(lambda *x: (run(*x), x), backward)
        return run(query_seq_lengths, q, k, v)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return given


def gradients(attend, q, k, v, w, positions):
    """The output, and the gradients of q, k and v where w [B,T,N,H] weighs all of it, padding too."""

    def loss(q, k, v):
        out = attend(q, k, v, positions)
        return (out * w).sum(), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize(
    ("mesh", "rows", "kv", "window", "local"),
    [
        (None, 5, 2, None, (5, 8, 2)),
        (None, 5, 4, 9, (5, 8, 4)),
        ({"fsdp": 2, "tensor": 2}, 4, 4, 9, (2, 4, 2)),
        ({"data": 2, "tensor": 2}, 5, 4, None, (5, 2, 1)),  # too few rows to divide: all devices divide the heads
        ({"data": 2, "tensor": 2}, 5, 2, 40, (5, 4, 1)),  # nor are there enough heads
    ],
)
def test_the_kernel_of_gpus_reads_rows_from_their_first_token(kernel, mesh, rows, kv, window, local):
    n, h = 8, 16
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, w = (jax.random.normal(x, (rows, T, heads, h)) for x, heads in zip(keys, (n, kv, kv, n), strict=True))
    positions = np.full((rows, T), -1, np.int32)
    for row, (start, end) in enumerate(REAL[:rows]):
        positions[row, start:end] = np.arange(end - start)
    live = (positions >= 0)[..., None, None]

    def einsum(q, k, v, positions):
        return jnp.where(live, attention.attend(q, k, v, positions, window, 0.3), 0)

    def by_kernel(q, k, v, positions):
        return attention.cudnn(q, k, v, positions, window, 0.3)

    want = gradients(einsum, q, k, v, w, positions)
    with jax.set_mesh(mesh_of(**mesh or {})):
        program = jax.jit(lambda *x: gradients(by_kernel, *x))
        got = program(q, k, v, w, positions)
        assert "scatter" not in program.lower(q, k, v, w, positions).as_text()
    b, heads, heads_kv = local
    assert set(kernel) == {((b, 128, heads, h), (b, 128, heads_kv, h))}
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        assert np.abs(y).max() > 0.1 and not np.asarray(x)[~np.broadcast_to(live, x.shape)].any()


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [
        (None, (64, 80, 96, 128)),
        ("7.5", ()),
        ("8.0", (64, 80, 96, 128)),
        ("9.0", (64, 80, 96, 128, 192, 256)),
        ("gfx942", ()),
    ],
)
def test_heads_that_the_kernel_of_gpus_does_not_take_are_left_to_the_einsum(kernel, monkeypatch, capability, sizes):
    if capability:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    monkeypatch.setattr(attention, "target", lambda: "gpu")
    positions = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    for size in (20, 64, 80, 96, 128, 192, 256, 320):
        for dtype in (jnp.bfloat16, jnp.float32):
            kernel.clear()
            q, k = (jax.ShapeDtypeStruct((2, 6, heads, size), dtype) for heads in (4, 2))
            out = jax.eval_shape(lambda *x: attention.attend(*x), q, k, k, positions)  # traced anew
            assert out.shape == q.shape and out.dtype == dtype
            assert bool(kernel) == (size in sizes and dtype == jnp.bfloat16)
