"""Real DeepSpeed ranks in real Ray actors, against one optimizer step in plain PyTorch."""

import os
import signal

import pytest
import torch

from learner.dispatch import Dispatcher
from learner.engine_deepspeed import inputs
from learner.losses import TokenBatch, policy_loss
from learner.policy import load_policy
from learner.rank_group import RankFailed, start_ranks
from learner.rows import prepare
from services.config.tree import Config
from services.errors import CheckpointFailed
from services.model_folder import read_weights
from services.weights.adapter import is_adapter, merged
from tests.learner.synthetic import play

pytestmark = pytest.mark.usefixtures("ray_cluster")

TERMS = {"kl_coef": 0.05, "entropy_coef": 0.01}


def changed(config, **sections):
    tree = config.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    return Config.model_validate(tree)


def groups(config):
    tickets = Dispatcher(config, {"train": 9}).tickets(range(4))
    return [[play(ticket) for ticket in tickets if ticket.group == group] for group in range(4)]


@pytest.fixture
def ranks():
    """Starts ranks and stops them at the end."""
    started = []

    def start(config):
        started.append(start_ranks(config))
        return started[-1]

    yield start
    for group in started:
        group.stop()


def plain_pytorch(config, rates):
    """Weights after one update in plain PyTorch: AdamW at these learning rates, clipped gradients, unpacked rows."""
    whole = changed(config, learner={"ranks": 1, "microbatch_tokens": 10_000})
    (steps,) = prepare(groups(config), whole, 0).work
    policy, frozen = (load_policy(config.model.path, "float32", config.rollout.temperature) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    arrays = [inputs(batch, torch.device("cpu")) for step in steps for batch in step.batches]
    fixed = [frozen(*each)[0].detach() for each in arrays]
    for step, own, first, rate in zip(steps, arrays, fixed, rates, strict=True):
        (batch,) = step.batches
        logprob, entropy = policy(*own, entropy_gradient=True)
        tokens = TokenBatch(
            logprob=logprob,
            behaviour=torch.tensor(batch.behaviour),
            advantage=torch.tensor(batch.advantage),
            weight=torch.tensor(batch.weight),
            old=first,
            reference=first,
            entropy=entropy,
        )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        policy_loss(tokens, config.loss, step.total_tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.grad_clip)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in policy.lm.named_parameters()}


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_one_rank_is_plain_pytorch_and_resumes_bit_identically_or_on_two_ranks(tiny_config, ranks, tmp_path):
    config = changed(tiny_config, loss=TERMS)
    work = [prepare(groups(config), config, update).work for update in range(3)]
    group = ranks(config)
    before = group.weights()
    metrics = group.update(work[0])
    after = group.weights()
    assert_same(after, plain_pytorch(config, [1e-3]), 1e-5)
    assert max(float((after[name] - before[name]).abs().max()) for name in after) > 5e-4
    assert metrics["ratio"] == pytest.approx(1.0)
    assert metrics["learning_rate"] == config.optimizer.lr
    assert metrics.keys() >= {"loss", "kl", "entropy", "clip_fraction", "logprob_gap", "grad_norm"}

    folder = tmp_path / "engine"
    folder.mkdir()
    group.save(folder)
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert written < group.checkpoint_bytes + 200_000
    for own in work[1:]:
        group.update(own)
    expected = group.weights()
    group.restart()
    group.load(folder)
    for own in work[1:]:
        group.update(own)
    assert_same(group.weights(), expected, 0)
    with pytest.raises(CheckpointFailed, match="checkpoint"):
        group.load(tmp_path / "nowhere")

    group.stop()
    wider = changed(config, learner={"ranks": 2, "zero_stage": 2, "offload_optimizer": True, "reference": "offloaded"})
    group = ranks(wider)
    group.load(folder)
    for update in (1, 2):
        group.update(prepare(groups(wider), wider, update).work)
    assert_same(group.weights(), expected, 1e-5)


def test_two_ranks_are_plain_pytorch_also_after_one_was_killed(tiny_config, ranks):
    config = changed(tiny_config, loss=TERMS, learner={"ranks": 2, "zero_stage": 1})
    work = prepare(groups(config), config, 0).work
    group = ranks(config)
    os.kill(group.pids[1], signal.SIGKILL)
    with pytest.raises(RankFailed, match="rank"):
        group.update(work)
    group.restart()
    group.update(work)
    assert_same(group.weights(), plain_pytorch(config, [1e-3]), 1e-5)


def test_two_ranks_of_sharded_parameters_take_several_optimizer_steps_and_resume_on_one(tiny_config, ranks, tmp_path):
    config = changed(
        tiny_config,
        loss=TERMS,
        optimizer={"warmup_updates": 2},
        learner={
            "ranks": 2,
            "zero_stage": 3,
            "minibatches": 2,
            "activation_checkpointing": True,
            "offload_parameters": True,
            "reference": "sharded",
        },
    )
    group = ranks(config)
    metrics = group.update(prepare(groups(config), config, 0).work)
    assert metrics["learning_rate"] == pytest.approx(config.optimizer.lr * 2 / 4)
    assert_same(group.weights(), plain_pytorch(config, [1e-3 / 4, 1e-3 * 2 / 4]), 1e-5)

    group.save(tmp_path)
    assert len(list(tmp_path.glob("random-*.pt"))) == 2
    group.update(prepare(groups(config), config, 1).work)
    expected = group.weights()
    group.stop()
    narrower = changed(
        config, learner={"ranks": 1, "zero_stage": 0, "offload_parameters": False, "microbatch_tokens": 100}
    )
    group = ranks(narrower)
    group.load(tmp_path)
    group.update(prepare(groups(narrower), narrower, 1).work)
    assert_same(group.weights(), expected, 1e-5)


def test_adapters_alone_are_trained_broadcast_and_saved(tiny_config, ranks, tmp_path):
    tree = tiny_config.model_dump()
    tree["model"]["lora"] = {"rank": 4, "alpha": 8}
    tree["loss"] |= TERMS
    config = Config.model_validate(tree)
    work = [prepare(groups(config), config, update).work for update in range(2)]
    group = ranks(config)
    base = read_weights(config.model.path)
    first = group.weights()
    assert is_adapter(first)
    assert_same(merged(first, base), base, 0)
    metrics = group.update(work[0])
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the model without its adapters
    group.save(tmp_path)
    assert group.update(work[1])["kl"] > 1e-6
    expected = group.weights()
    moved = merged(expected, base)
    assert max(float((moved[name] - base[name]).abs().max()) for name in base) > 1e-5
    group.load(tmp_path)
    group.update(work[1])
    assert_same(group.weights(), expected, 0)
