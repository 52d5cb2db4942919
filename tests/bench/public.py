"""The opponent of step.py from the public challenge: the training step of its starter script, or of a script like that of its record PR #1855.

    OPPONENT=path/to/train_gpt.py python tests/bench/step.py PRESET=baseline --share 8 --against tests/bench/public.py

The script is imported as it is and told our shapes through the environment, as its own users do; its model, optimisers, loss and order of a step are
its own. What lies in its `main` and cannot be called is done here in the same way: the dtypes of the starter's weights, the optimisers that it makes,
the average of the record's weights after every step. On a CPU the starter runs in float32, but for its orthogonalisation; the record needs its GPU.
"""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Ours -> theirs, where the names differ; other settings of the shape have one name in all scripts.
NAMES = {
    "SCALAR_WEIGHT_DECAY": "ADAM_WD", "MUON_WEIGHT_DECAY": "MUON_WD", "EMBED_WEIGHT_DECAY": "EMBED_WD", "LR_FLOOR_FRAC": "MIN_LR",
}  # fmt: skip
ALIKE = (
    "VOCAB_SIZE NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT TIE_EMBEDDINGS TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS ROPE_BASE ROPE_DIMS LN_SCALE XSA_LAST_N"
    " NUM_LOOPS LOOP_START LOOP_END PARALLEL_START_LAYER LOGIT_SOFTCAP QK_GAIN_INIT GATE_WINDOW MUON_BACKEND_STEPS MUON_ROW_NORMALIZE GRAD_CLIP_NORM"
    " EMA_DECAY MATRIX_LR SCALAR_LR TIED_EMBED_LR BETA1 BETA2 ADAM_EPS MUON_MOMENTUM"
).split()


def load(config: Any) -> ModuleType:
    """Returns the module of the script that OPPONENT names, its settings those of `config`."""
    path = Path(os.environ.get("OPPONENT", ""))
    if not path.is_file():
        raise SystemExit(f"OPPONENT={path}: no such file; name a public train_gpt.py, from a copy of github.com/openai/parameter-golf")
    shape = {name: getattr(config, name.lower()) for name in ALIKE} | {theirs: getattr(config, ours.lower()) for ours, theirs in NAMES.items()}
    if float(config.mlp_mult).is_integer():
        shape["MLP_MULT"] = int(config.mlp_mult)  # all that the starter reads
    gated, smeared = config.attention_gate_window > 0, config.use_smeargate
    switches = {"SPARSE_ATTN_GATE_ENABLED": gated, "SMEAR_GATE_ENABLED": smeared, "SKIP_GATES_ENABLED": config.skip_connections == "gated"}
    settings = {name: str(int(value) if isinstance(value, bool) else value) for name, value in {**shape, **switches}.items()}
    spec = importlib.util.spec_from_file_location("public_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, settings):  # read when the script is imported
        spec.loader.exec_module(module)
    return module


def opponent(config: Any, device: torch.device) -> Callable[[Tensor], None]:
    """Returns a training step on rows (B, T + 1), for the shapes of `config`."""
    theirs = load(config)
    return record_step(theirs, config, device) if hasattr(theirs, "Optimizers") else starter_step(theirs, config, device)


@contextlib.contextmanager
def mixed(device: torch.device) -> Iterator[None]:
    """Activations in bfloat16 on a GPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        yield


def starter_step(theirs: ModuleType, config: Any, device: torch.device) -> Callable[[Tensor], None]:
    """Returns the starter's step: Muon for the matrices of blocks, one fused Adam for the embedding and one for everything else."""
    given = theirs.Hyperparameters()
    shape = "vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult tie_embeddings tied_embed_init_std logit_softcap rope_base qk_gain_init"
    model = theirs.GPT(**{name: getattr(given, name) for name in shape.split()}).to(device)
    if device.type == "cuda":
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, theirs.CastedLinear):
                module.float()
        theirs.restore_low_dim_params_to_fp32(model)
    embedding, matrices, others = model.tok_emb.weight, list[Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        if parameter is not embedding:
            controls = parameter.dim() < 2 or any(pattern in name for pattern in theirs.CONTROL_TENSOR_NAME_PATTERNS)
            (others if controls else matrices).append(parameter)
    adam: dict[str, Any] = {"betas": (given.beta1, given.beta2), "eps": given.adam_eps, "fused": True}
    optimizers = [
        torch.optim.Adam([embedding], given.tied_embed_lr, **adam),
        theirs.Muon(matrices, lr=given.matrix_lr, momentum=given.muon_momentum, backend_steps=given.muon_backend_steps),
        torch.optim.Adam(others, given.scalar_lr, **adam),
    ]
    if config.compile:
        vars(theirs)["zeropower_via_newtonschulz5"] = torch.compile(theirs.zeropower_via_newtonschulz5)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if config.compile else model

    def step(rows: Tensor) -> None:
        for part in rows.split(max(config.micro_batch_tokens // config.train_seq_len, 1)):
            with mixed(device):
                loss = forward(part[:, :-1], part[:, 1:])
            (loss * (len(part) / len(rows))).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def record_step(theirs: ModuleType, config: Any, device: torch.device) -> Callable[[Tensor], None]:
    """Returns the record's step on rows laid end to end, its attention within documents; the average of weights follows every step."""
    given = theirs.Hyperparameters()
    model = theirs.GPT(given).to(device).bfloat16()
    theirs.restore_fp32_params(model)
    model.looping_active = config.num_loops > 0
    optimizers = theirs.Optimizers(given, model)
    kept = {name: value.detach().float().clone() for name, value in model.state_dict().items()}
    forward = torch.compile(model, fullgraph=True, dynamic=False) if config.compile else model
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step(rows: Tensor) -> None:
        for part in rows.split(max(config.micro_batch_tokens // config.train_seq_len, 1)):
            tokens, targets = (side.reshape(1, -1) for side in (part[:, :-1], part[:, 1:]))
            starts = tokens[0] == config.bos_id
            starts[:: config.train_seq_len] = True
            offsets, _ = theirs._build_cu_seqlens(starts.nonzero()[:, 0].tolist(), tokens.shape[1], device, config.train_seq_len, 64)
            with mixed(device):
                loss = forward(tokens, targets, cu_seqlens=offsets, max_seqlen=config.train_seq_len)
            (loss * (len(part) / len(rows))).backward()
        torch.nn.utils.clip_grad_norm_(weights, given.grad_clip_norm)
        optimizers.step(distributed=False)
        with torch.no_grad():
            for name, value in model.state_dict().items():
                kept[name].mul_(given.ema_decay).add_(value.detach(), alpha=1 - given.ema_decay)

    return step
