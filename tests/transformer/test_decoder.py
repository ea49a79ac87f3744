from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxarch.attention.cost import flops
from jaxarch.run import backend
from jaxarch.run.operations import counted
from jaxarch.run.protocol import ConfigError
from jaxarch.transformer.blocks import stack_layers, unstack_layers
from jaxarch.transformer.decoder import ModelConfig, decoder, forward_flops, gpt2, llama
from jaxarch.transformer.positions import Rotary

VOCAB, LENGTH = 65, 24
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, size=(3, LENGTH)), jnp.int32)

GPT2, LLAMA = gpt2(2, 4, 64), llama(2, 4, 64, kv_heads=2)
MIXED = ModelConfig(
    2,
    4,
    64,
    kv_heads=1,
    mlp="relu2",
    norm="rms",
    positions="sinusoidal",
    qk_norm=True,
    soft_cap=5.0,
    attention_soft_cap=3.0,
)
# All that Gemma 2 has and the others have not.
GEMMA = ModelConfig(
    2,
    4,
    64,
    kv_heads=2,
    head_width=24,
    window=(9, 0),
    mlp="geglu",
    norm="zero_centered_rms",
    placement="both",
    positions="rotary",
    scale_embedding=True,
    soft_cap=5.0,
    attention_scale=0.25,
    attention_soft_cap=3.0,
    attention_bias="qkv",
)
CONFIGS = {
    "gemma": GEMMA,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mixed": MIXED,
    "scanned": dataclasses.replace(LLAMA, scan_layers=True),
    "alibi": dataclasses.replace(LLAMA, positions="alibi"),
}


def drawn(model):
    """Variables with nothing at 0 or 1, so that no part is without effect (a read-out begins at 0)."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), leaf.dtype), shapes)


def applied(model, variables, tokens=TOKENS):
    return jax.jit(model.apply)(variables, tokens)


# --- operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_by_formula_are_those_of_the_program(name):
    """Exactly, once the pairs are added that the mask hides: at this length attention multiplies them all."""
    config = CONFIGS[name]
    model = decoder(config, VOCAB, LENGTH)
    params = drawn(model)["params"]

    def program(params):
        return model.apply({"params": params}, TOKENS)

    dim = config.head_dim
    hidden = config.layers * flops(LENGTH * (LENGTH - 1) // 2, 3, 4, dim, dim)  # batch, heads
    if name == "gemma":  # all of the past but 9 keys, in one layer
        hidden += flops(sum(range(LENGTH - 9 + 1)), 3, 4, dim, dim)
    expected = forward_flops(config, VOCAB, 3, LENGTH) + hidden
    assert counted(jax.make_jaxpr(program)(params)) == {"float32": expected}
    gradient = jax.value_and_grad(lambda params: program(params).var())
    assert counted(jax.make_jaxpr(gradient)(params)) == {"float32": 3 * expected}


def test_operations_by_hand():
    """One token through a layer of width 2: 4 projections of 4, two of 16 that feed forward, 1 pair, 5 logits."""
    config = ModelConfig(1, 1, 2)
    assert forward_flops(config, 5, 1, 1) == 2 * (4 * 4 + 2 * 16 + (2 + 2) + 2 * 5)
    wide = dataclasses.replace(config, head_width=3)
    assert forward_flops(wide, 5, 1, 1) == 2 * (4 * 6 + 2 * 16 + (3 + 3) + 2 * 5)
    assert forward_flops(config, 5, 7, 3) == 7 * 2 * (3 * (4 * 4 + 2 * 16 + 2 * 5) + 6 * (2 + 2))
    # A window of 2 shows 5 pairs of 3 tokens, and geglu has three products.
    windows = dataclasses.replace(config, layers=3, window=(2, 0), mlp="geglu", mlp_dim=8)
    assert forward_flops(windows, 5, 7, 3) == 7 * 2 * (3 * (3 * (4 * 4 + 3 * 16) + 2 * 5) + (5 + 6 + 5) * (2 + 2))


# --- initialisation -----------------------------------------------------------------------------

WIDE = gpt2(2, 4, 768)  # where a tied read-out of standard deviation 0.02 begins 6 % above log V


STARTS = {
    "gpt2": GPT2,
    "gpt2 free": dataclasses.replace(GPT2, tied=False),
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tied=True),
    "mixed": MIXED,
    "gemma": GEMMA,
    "wide": WIDE,
}


@pytest.mark.parametrize("name", STARTS)
def test_the_loss_begins_at_log_vocab(name):
    model = decoder(STARTS[name], VOCAB, LENGTH)
    # Two programs: in one, the read-out's zeros are a constant, whose product jax 0.11.2 gets wrong on CPU.
    init, apply = jax.jit(model.init), jax.jit(model.apply)
    for seed in range(3):
        logits = apply(init(jax.random.key(seed), TOKENS), TOKENS)
        targets = np.random.default_rng(100 + seed).integers(0, VOCAB, size=(*TOKENS.shape, 1))
        loss = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets, axis=-1).mean()
        np.testing.assert_allclose(loss, np.log(VOCAB), rtol=0.02)


@pytest.fixture(scope="module")
def llama_start():
    return jax.jit(decoder(LLAMA, VOCAB, LENGTH).init)(jax.random.key(3), TOKENS)["params"]


def test_what_layers_add_is_scaled_by_their_number(llama_start):
    layer = llama_start["layers_1"]
    for kernel in layer["attention"]["out"]["kernel"], layer["feed_forward"]["down"]["kernel"]:
        np.testing.assert_allclose(kernel.std(), 0.02 / 4**0.5, rtol=0.05)  # two layers add four times
    np.testing.assert_allclose(layer["attention"]["query"]["kernel"].std(), 0.02, rtol=0.05)


def test_layers_begin_unequal(llama_start):
    kernels = [llama_start[f"layers_{i}"]["feed_forward"]["up"]["kernel"] for i in range(2)]
    assert abs(np.corrcoef(*map(np.ravel, kernels))[0, 1]) < 0.05


# --- what a position may see --------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_no_information_from_the_future(name):
    model = decoder(CONFIGS[name], VOCAB, LENGTH)
    variables = drawn(model)
    logits = applied(model, variables)
    changed = TOKENS.at[:, 11:].set((TOKENS[:, 11:] + 1) % VOCAB)
    after = applied(model, variables, changed)
    np.testing.assert_array_equal(after[:, :11], logits[:, :11])
    assert (jnp.abs(after[:, 11:] - logits[:, 11:]).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_all_of_the_past_counts(name):
    model = decoder(CONFIGS[name], VOCAB, LENGTH)
    variables = drawn(model)
    change = applied(model, variables, TOKENS.at[:, 0].add(1)) - applied(model, variables)
    assert (jnp.abs(change).max(axis=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("window", [1, 2, 9, LENGTH - 1, LENGTH])
def test_a_window_reaches_as_far_as_it_says(window):
    """Itself and window - 1 keys before, in each of two layers: 2 (window - 1) positions, and not one more."""
    model = decoder(dataclasses.replace(LLAMA, window=(window,)), VOCAB, LENGTH)
    variables = drawn(model)
    change = applied(model, variables, TOKENS.at[:, 0].add(1)) - applied(model, variables)
    reached = jnp.abs(change).max(axis=(0, 2))
    assert (reached[: 2 * window - 1] > 1e-5).all() and not reached[2 * window - 1 :].any()


def test_layers_take_their_windows_in_turn():
    """Windows of 2 and 4 in three layers reach 1 + 3 + 1 positions; the parameters are as without."""
    config = dataclasses.replace(LLAMA, layers=3, window=(2, 4))
    model = decoder(config, VOCAB, LENGTH)
    variables = drawn(model)
    change = applied(model, variables, TOKENS.at[:, 0].add(1)) - applied(model, variables)
    reached = jnp.abs(change).max(axis=(0, 2))
    assert (reached[:6] > 1e-5).all() and not reached[6:].any()
    whole = decoder(dataclasses.replace(config, window=(LENGTH,)), VOCAB, LENGTH)
    full = decoder(dataclasses.replace(config, window=(0,)), VOCAB, LENGTH)
    np.testing.assert_array_equal(applied(whole, variables), applied(full, variables))


def test_windows_as_short_as_they_say_the_same():
    for given, layers, expected in (
        ((0,), 3, (0,)),
        ((5, 5), 3, (5,)),
        ((5, 0, 5, 0), 4, (5, 0)),
        ((5, 0, 5), 3, (5, 0)),
        ((0, 5, 5), 3, (0, 5, 5)),
        ((5, 0), 1, (5,)),
        ((0, 0, 0, 5), 4, (0, 0, 0, 5)),
    ):
        assert ModelConfig(layers, window=given).windows == expected


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi", "none"])
def test_order_counts_where_there_are_positions(positions):
    """One layer, so that the last of the logits sees a set of tokens unless it is told where they stand."""
    model = decoder(ModelConfig(1, 4, 64, positions=positions), VOCAB, LENGTH)
    variables = drawn(model)
    swapped = TOKENS.at[:, 1].set(TOKENS[:, 2]).at[:, 2].set(TOKENS[:, 1])
    change = jnp.abs(applied(model, variables, swapped) - applied(model, variables))[:, -1].max()
    assert change < 1e-5 if positions == "none" else change > 1e-4


SCALINGS = {
    "linear": Rotary(100.0, "linear", 2.0),
    "dynamic": Rotary(100.0, "dynamic", 2.0, 8),
    "yarn": Rotary(100.0, "yarn", 4.0, 12),
    "llama3": Rotary(100.0, "llama3", 8.0, 16),
}


def scaled(kind):
    return dataclasses.replace(LLAMA, rotary=SCALINGS[kind])


SHIFTED = {"rotary": LLAMA, "alibi": CONFIGS["alibi"], "yarn": scaled("yarn"), "llama3": scaled("llama3")}


@pytest.mark.parametrize("name", SHIFTED)
def test_only_distances_count(name):
    """And they do: positions twice as far apart give other logits."""
    model = decoder(SHIFTED[name], VOCAB, LENGTH)
    variables = drawn(model)
    placed = jax.jit(lambda positions: model.apply(variables, TOKENS, positions))
    positions = jnp.arange(LENGTH)[None]
    logits = placed(positions)
    np.testing.assert_allclose(placed(positions + 37), logits, atol=2e-4 * jnp.abs(logits).max())
    assert jnp.abs(placed(2 * positions) - logits).max() > 0.05 * jnp.abs(logits).max()


# --- the stack ----------------------------------------------------------------------------------


def loss_and_grads(config, variables, dropout_key=None):
    model = decoder(config, VOCAB, LENGTH)

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return jnp.square(model.apply(variables, TOKENS, deterministic=dropout_key is None, rngs=rngs)).mean()

    return loss(variables)


def assert_close(actual, expected):
    """To the rounding of sums of float32 in another order."""
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def as_scanned(variables):
    return {"params": stack_layers(variables["params"])}


@pytest.mark.parametrize("config", [dataclasses.replace(GPT2, dropout=0.3), LLAMA], ids=["dropout", "llama"])
def test_scanned_layers_equal_unrolled_ones(config):
    scanned = dataclasses.replace(config, scan_layers=True)
    variables = drawn(decoder(config, VOCAB, LENGTH))
    key = jax.random.key(5) if config.dropout else None
    value, grads = loss_and_grads(config, variables, key)
    scanned_value, scanned_grads = loss_and_grads(scanned, as_scanned(variables), key)
    np.testing.assert_allclose(scanned_value, value, rtol=1e-5)
    jax.tree.map(assert_close, scanned_grads, as_scanned(grads))


def test_scanned_and_unrolled_parameters_are_the_same_numbers(llama_start):
    scanned = jax.jit(decoder(CONFIGS["scanned"], VOCAB, LENGTH).init)(jax.random.key(3), TOKENS)["params"]
    jax.tree.map(np.testing.assert_array_equal, stack_layers(llama_start), scanned)
    jax.tree.map(np.testing.assert_array_equal, llama_start, unstack_layers(scanned))


def test_layers_drop_different_things():
    """With one key for all layers, two layers of equal parameters would drop the same features."""
    config = dataclasses.replace(GPT2, dropout=0.5)
    model = decoder(config, VOCAB, LENGTH)
    params = drawn(model)["params"]
    silent = jax.tree.map(jnp.zeros_like, params)  # each feed-forward layer adds its bias of ones, or drops it
    for name in ("layers_0", "layers_1"):
        silent[name]["feed_forward"]["down"]["bias"] = jnp.ones(64)
    silent["norm"]["scale"] = jnp.ones(64)
    silent["embedding"]["embedding"] = jnp.eye(VOCAB, 64)
    rngs = {"dropout": jax.random.key(0)}
    logits = model.apply({"params": silent}, TOKENS, deterministic=False, rngs=rngs)
    # Sums of two independent masks take three values; of one mask twice, two. The embedding's own is one feature.
    assert len(np.unique(np.round(logits[0, 0, :64], 4))) >= 3


def test_dropout_is_off_by_default_and_follows_its_key():
    model = decoder(dataclasses.replace(GPT2, dropout=0.5), VOCAB, LENGTH)
    variables = drawn(model)
    np.testing.assert_array_equal(applied(model, variables), applied(decoder(GPT2, VOCAB, LENGTH), variables))
    drop = jax.jit(
        lambda seed: model.apply(variables, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    )
    np.testing.assert_array_equal(drop(0), drop(0))
    assert jnp.abs(drop(0) - drop(1)).max() > 0.1


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_lowers_temporaries_and_keeps_gradients(scan_layers):
    config = ModelConfig(4, 2, 32, dropout=0.1, scan_layers=scan_layers)
    tokens = jnp.zeros((8, 64), jnp.int32)
    key = jax.random.key(2)

    def compiled(remat):
        model = decoder(dataclasses.replace(config, remat=remat), VOCAB, 64)

        def loss(variables):
            return jnp.square(model.apply(variables, tokens, deterministic=False, rngs={"dropout": key})).mean()

        variables = drawn(model)
        return backend.compiled(jax.jit(jax.grad(loss)).trace(variables))[0], variables

    (kept, variables), (recomputed, _) = compiled(False), compiled(True)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (recomputed, kept)]
    assert sizes[0] < 0.5 * sizes[1], sizes
    jax.tree.map(assert_close, recomputed(variables), kept(variables))


# --- types, limits, messages --------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_stays_near_float32(name):
    """bfloat16 has 8 bits: roundings of 0.4 % in each of some ten operations in a row."""
    model = decoder(CONFIGS[name], VOCAB, LENGTH)
    half = decoder(CONFIGS[name], VOCAB, LENGTH, jnp.bfloat16)
    variables = drawn(model)
    logits, rounded = applied(model, variables), applied(half, variables)
    assert rounded.dtype == jnp.float32
    assert all(
        leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), TOKENS))
    )
    error = jnp.abs(rounded - logits)
    assert 0 < error.max() < 0.05 * jnp.abs(logits).max() and error.mean() < 0.01 * jnp.abs(logits).max()


def test_soft_caps_bound():
    model = decoder(dataclasses.replace(GPT2, soft_cap=0.5), VOCAB, LENGTH)
    variables = drawn(model)
    free = applied(decoder(GPT2, VOCAB, LENGTH), variables)
    np.testing.assert_allclose(applied(model, variables), 0.5 * np.tanh(free / 0.5), rtol=1e-4, atol=1e-5)
    assert jnp.abs(free).max() > 1
    capped = decoder(dataclasses.replace(GPT2, attention_soft_cap=1e-6), VOCAB, LENGTH)
    flat = jax.tree.map(lambda leaf: leaf, variables)
    for layer in ("layers_0", "layers_1"):  # without keys all logits of the attention are 0
        flat["params"][layer]["attention"]["key"] = jax.tree.map(
            jnp.zeros_like, flat["params"][layer]["attention"]["key"]
        )
    np.testing.assert_allclose(applied(capped, variables), applied(decoder(GPT2, VOCAB, LENGTH), flat), atol=1e-4)


REFUSED = {
    "--model.heads 5 does not divide --model.dim 64; 4 or 8 would.": {"heads": 5, "dim": 64},
    "--model.heads 3 does not divide --model.dim 4; 2 or 4 would.": {"heads": 3, "dim": 4},
    "--model.kv-heads 3 does not divide --model.heads 4; 2 or 4 would.": {"kv_heads": 3},
    "--model.kv-heads 8 does not divide --model.heads 4; 4 would.": {"kv_heads": 8},
    "--model.layers 0 is below 1.": {"layers": 0},
    "--model.mlp-dim -1 is below 0; 0 is the default.": {"mlp_dim": -1},
    "--model.positions rotary needs heads of even width, not --model.dim 20 / --model.heads 4 = 5; --model.dim 24 "
    "would do.": {"dim": 20, "positions": "rotary"},
    "--model.positions rotary needs heads of even width, not --model.head-width 3; 4 would do.": {
        "head_width": 3,
        "positions": "rotary",
    },
    "--model.dim 5 is odd, but --model.positions sinusoidal needs pairs; --model.dim 6 would do.": {
        "dim": 5,
        "heads": 1,
        "positions": "sinusoidal",
    },
    "--model.dropout 1 is not in [0, 1); 0.1 is usual.": {"dropout": 1.0},
    "--model.rotary.base 1 is not above 1; 10000 is usual.": {"rotary": Rotary(1.0)},
    "--model.rotary.scaling linear needs --model.positions rotary, not learned.": {"rotary": Rotary(scaling="linear")},
    "--model.rotary.factor 0.5 is below 1, which leaves all as it is.": {
        "positions": "rotary",
        "rotary": Rotary(scaling="linear", factor=0.5),
    },
    "--model.rotary.scaling yarn needs --model.rotary.length, the tokens of a text in training, not 0; 8192 is "
    "Llama 3's.": {"positions": "rotary", "rotary": Rotary(scaling="yarn")},
    "--model.rotary.slow-turns 4 is not between 0 and the fast turns, 4; 1 is usual.": {
        "positions": "rotary",
        "rotary": Rotary(scaling="llama3", length=8, slow_turns=4.0),
    },
    "--model.rotary.slow-turns 0 is not between 0 and the fast turns, 2; 1 is usual.": {
        "positions": "rotary",
        "rotary": Rotary(scaling="yarn", length=8, fast_turns=2.0, slow_turns=0.0),
    },
    "--model.rotary.attention-factor -1 is below 0; 0 is the default.": {
        "positions": "rotary",
        "rotary": Rotary(scaling="yarn", length=8, attention_factor=-1.0),
    },
    "--model.rotary.scaling dynamic needs heads wider than --model.dim 8 / --model.heads 4 = 2; --model.dim 16 would "
    "do.": {"dim": 8, "positions": "rotary", "rotary": Rotary(scaling="dynamic", length=8)},
    "--model.window 4 -1 is no number of keys; 0 is all of the past.": {"window": (4, -1)},
    "--model.window  is no number of keys; 0 is all of the past.": {"window": ()},
    "--model.scan-layers compiles one kind of layer, but --model.window 8 0 makes 2.": {
        "window": (8, 0),
        "scan_layers": True,
    },
    "--model.attention-scale -1 is below 0; 0 is the default.": {"attention_scale": -1.0},
    "--model.eps 0 is not above 0; 1e-5 is usual.": {"eps": 0.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_numbers_that_do_not_fit_are_refused(message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        ModelConfig(**REFUSED[message])


def test_more_tokens_than_learned_positions_are_refused():
    with pytest.raises(ConfigError, match="24 tokens do not fit the model's length; 23 would"):
        jax.eval_shape(decoder(GPT2, VOCAB, 23).init, jax.random.key(0), TOKENS)


# --- parity with published models ---------------------------------------------------------------


def numbers(tensor):
    return jnp.asarray(tensor.detach().numpy())


def test_gpt2_equals_huggingface():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    body = theirs.transformer

    def dense(layer, columns=slice(None)):
        return {"kernel": numbers(layer.weight)[:, columns], "bias": numbers(layer.bias)[columns]}

    def norm(layer):
        return {"scale": numbers(layer.weight), "bias": numbers(layer.bias)}

    params = {
        "embedding": {"embedding": numbers(body.wte.weight)},
        "positions": {"embedding": numbers(body.wpe.weight)},
        "norm": norm(body.ln_f),
    }
    for i, block in enumerate(body.h):
        q, k, v = (dense(block.attn.c_attn, slice(64 * n, 64 * n + 64)) for n in range(3))
        params[f"layers_{i}"] = {
            "attention_norm": norm(block.ln_1),
            "attention": {"query": q, "key": k, "value": v, "out": dense(block.attn.c_proj)},
            "feed_forward_norm": norm(block.ln_2),
            "feed_forward": {"up": dense(block.mlp.c_fc), "down": dense(block.mlp.c_proj)},
        }
    logits = applied(decoder(GPT2, VOCAB, LENGTH), {"params": params})
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["none", *SCALINGS])
def test_llama_equals_huggingface(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = LLAMA if kind == "none" else scaled(kind)
    rope = {"rope_type": "default" if kind == "none" else kind, "rope_theta": config.rotary.base}
    rope |= {"factor": config.rotary.factor, "original_max_position_embeddings": config.rotary.length}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=config.rotary.length if kind == "dynamic" else LENGTH,
            rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)

    def dense(layer):
        return {"kernel": numbers(layer.weight).T}

    def norm(layer):
        return {"scale": numbers(layer.weight)}

    params = {
        "embedding": {"embedding": numbers(theirs.model.embed_tokens.weight)},
        "norm": norm(theirs.model.norm),
        "readout": dense(theirs.lm_head),
    }
    for i, block in enumerate(theirs.model.layers):
        attention, mlp = block.self_attn, block.mlp
        params[f"layers_{i}"] = {
            "attention_norm": norm(block.input_layernorm),
            "attention": {
                "query": dense(attention.q_proj),
                "key": dense(attention.k_proj),
                "value": dense(attention.v_proj),
                "out": dense(attention.o_proj),
            },
            "feed_forward_norm": norm(block.post_attention_layernorm),
            "feed_forward": {
                "gate": dense(mlp.gate_proj),
                "up": dense(mlp.up_proj),
                "down": dense(mlp.down_proj),
            },
        }
    logits = applied(decoder(config, VOCAB, LENGTH), {"params": params})
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(TOKENS))).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
