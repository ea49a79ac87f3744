"""Which mesh is best for a decoder-only Transformer on a machine that is not here?

python -m benchmarks.plan --machine h100 --devices 64 --model llama-8b --length 8192 --global-batch 512 --remat full
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.planning import Job, Mesh, Model
from jaxarch.data.text import Tokens
from jaxarch.run import Experiment
from jaxarch.run.mesh import make_mesh
from jaxarch.run.program import Member, Programs
from jaxarch.transformer.decoder import ModelConfig, decoder
from jaxarch.transformer.layout import LAYOUT
from jaxarch.transformer.training import PRECISIONS, Hypers, OptimConfig, make_init, make_step, next_token


def subject(model: Model, job: Job, scan: bool = True) -> tuple[Experiment, Tokens]:
    """The training step that is planned, and the shapes of its batch. Nothing is allocated.

    scan: the layers are compiled as one.
    """
    config = ModelConfig(
        model.layers,
        model.heads,
        model.dim,
        model.kv_heads,
        model.head_dim,
        mlp="swiglu" if model.gated else "gelu",
        mlp_dim=model.hidden,
        norm="rms",
        positions="rotary",
        tied=model.tied,
        remat=job.remat == "full",
        scan_layers=scan,
    )
    network = decoder(config, model.vocab, job.length, PRECISIONS[{2: "bf16", 4: "f32"}[job.compute]])
    optim = OptimConfig()
    step = make_step(next_token(network), optim, 1000)
    shape = job.batch, job.length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    init = make_init(network, network.inputs(), optim)
    experiment = Experiment(init, step, lambda state, key: {}, batch_size=job.batch, hypers=Hypers(), layout=LAYOUT)
    return experiment, Tokens(tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.float32))


def compiled(model: Model, job: Job, mesh: Mesh, scan: bool = True) -> tuple[Programs, jax.stages.Compiled]:
    """The training step for as many devices as the mesh has, of which there must be enough."""
    experiment, batch = subject(model, job, scan)
    sizes = {name: size for name, size in mesh._asdict().items() if size > 1}
    programs = Programs(experiment, [Member(0, {})], make_mesh(sizes) if sizes else None)
    return programs, programs.compiled_step(batch)
