"""Real DeepSpeed ranks in real Ray actors, against one optimizer step in plain PyTorch."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from learner.checkpoint import whole_policy
from learner.dispatch import Dispatcher
from learner.prepare import prepare
from learner.rank import engine_deepspeed
from learner.rank import group as rank_group
from learner.rank.group import RankFailed, start_ranks
from learner.rank.losses import TokenBatch, policy_loss
from learner.rank.policy import Route, inputs, load_policy
from learner.rank.schedule import rate_factor
from learner.rank.shards import ShardReader
from services.config.tree import Config
from services.errors import CheckpointFailed, ModelUnavailable, RunStalled, UpdateNotFinite
from services.model_folder import read_weights
from services.weights.adapter import is_adapter, merged
from services.weights.directory import DirectoryChannel
from tests.learner.published import published
from tests.learner.rank.architectures import PACKED, ROWS, write_architecture
from tests.learner.synthetic import play
from tests.waiting import until

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


def plain_pytorch(config, rates, route=None):
    """After one update in plain PyTorch: weights, Adam's mean gradients, and the last gradient's norm before its clip.

    AdamW at these learning rates, clipped gradients, unpacked rows.
    """
    whole = changed(config, learner={"ranks": 1, "microbatch_tokens": 10_000})
    (steps,) = prepare(groups(config), whole, 0).work
    temperature = config.rollout.temperature
    policy, frozen = (load_policy(config.model.path, "float32", temperature, route=route) for _ in range(2))
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
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.grad_clip)
        optimizer.step()
    parameters = dict(policy.lm.named_parameters())
    moments = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in parameters.items()}
    return {name: parameter.detach() for name, parameter in parameters.items()}, moments, float(norm)


def assert_plain_pytorch(config, group, metrics, rates, route=None):
    """Weights to 1e-5, and the gradient's scale, which AdamW's step does not depend on."""
    weights, moments, norm = plain_pytorch(config, rates, route)
    assert_same(published(group), weights, 1e-5)
    if config.learner.zero_stage > 0:
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    return moments


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_random_states_survive(group, folder, again):
    """Each of two ranks takes up the random state in its file, whatever its own was, and writes it again."""
    states = [torch.Generator().manual_seed(100 + rank).get_state() for rank in range(2)]
    for rank, state in enumerate(states):
        save_file({"cpu": state}, folder / f"random-{rank:05d}.safetensors")
    again.mkdir()
    group.load(folder)
    group.save(again)
    for rank, state in enumerate(states):
        assert torch.equal(load_file(again / f"random-{rank:05d}.safetensors")["cpu"], state)


def assert_published(group, folder):
    """The ranks publish the weights that they have, and export them as a model; what they published stays as it was."""
    channel, weights = DirectoryChannel(folder, 60.0), published(group)
    for version in (1, 2):
        group.publish(version, channel)
        until(group.published)
        newest = channel.latest()
        assert newest.version == version
        assert_same(channel.fetch(newest), weights, 0)
    group.export(folder / "policy")
    exported = read_weights(folder / "policy")
    assert_same(exported, whole_policy(weights, group._config.model.path), 0)


def test_parameters_are_gathered_in_lots(monkeypatch):
    monkeypatch.setattr(engine_deepspeed, "LOT_BYTES", 200)
    parameters = {
        name: torch.nn.Parameter(torch.zeros(size)) for name, size in zip("abcde", (20, 25, 60, 5, 1), strict=True)
    }
    parts = [("a", "buffer"), ("b",), ("c",), ("d", "e")]
    lots = list(engine_deepspeed._lots(parts, parameters))
    assert lots == [[("a", "buffer"), ("b",)], [("c",)], [("d", "e")]]


def test_one_rank_is_plain_pytorch_and_resumes_bit_identically_or_on_two_ranks(tiny_config, ranks, tmp_path):
    config = changed(tiny_config, loss=TERMS)
    work = [prepare(groups(config), config, update).work for update in range(3)]
    group = ranks(config)
    before = published(group)
    metrics = group.update(work[0])
    after = published(group)
    assert_plain_pytorch(config, group, metrics, [1e-3])
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
    expected = published(group)
    group.restart()
    group.load(folder)
    for own in work[1:]:
        group.update(own)
    assert_same(published(group), expected, 0)
    with pytest.raises(CheckpointFailed, match="checkpoint"):
        group.load(tmp_path / "nowhere")

    group.stop()
    wider = changed(config, learner={"ranks": 2, "zero_stage": 2, "offload_optimizer": True, "reference": "offloaded"})
    group = ranks(wider)
    group.load(folder)
    for update in (1, 2):
        group.update(prepare(groups(wider), wider, update).work)
    assert_same(published(group), expected, 1e-5)
    assert_random_states_survive(group, folder, tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "learner"),
    [
        ("lfm2", {"ranks": 2, "zero_stage": 3, "activation_checkpointing": True, "reference": "sharded"}),
        ("stablelm", {"ranks": 1, "zero_stage": 2}),
        ("falcon_alibi", {"ranks": 2, "zero_stage": 1}),
    ],
)
def test_other_architectures_are_plain_pytorch(tiny_config, ranks, tmp_path, name, learner):
    """Rows one by one on unevenly loaded ranks; dropout, which StableLM has here, is off."""
    folder = write_architecture(tmp_path / name, (PACKED | ROWS)[name]())
    model = {"path": folder, "max_prompt_tokens": 100}
    config = changed(tiny_config, loss=TERMS, learner=learner, model=model)
    group = ranks(config)
    route = Route(packed=name in PACKED)
    assert group.parity.route == route
    assert group.sharing == ("lines" if name in PACKED else "prefixes")
    metrics = group.update(prepare(groups(config), config, 0, group.sharing).work)
    assert_plain_pytorch(config, group, metrics, [1e-3], route)


def test_what_cannot_be_trained_is_refused_by_the_ranks(tiny_config, ranks, tmp_path):
    folder = write_architecture(tmp_path / "gpt2", PACKED["gpt2"]())
    config = changed(tiny_config, model={"path": folder, "max_prompt_tokens": 400})
    with pytest.raises(ModelUnavailable, match=r"fails on a row of 424 tokens"):
        ranks(config)


def test_two_ranks_are_plain_pytorch_also_after_one_was_killed(tiny_config, ranks):
    config = changed(tiny_config, loss=TERMS, learner={"ranks": 2, "zero_stage": 1})
    work = prepare(groups(config), config, 0).work
    group = ranks(config)
    os.kill(group.pids[1], signal.SIGKILL)
    with pytest.raises(RankFailed, match="rank"):
        group.update(work)
    group.restart()
    assert_plain_pytorch(config, group, group.update(work), [1e-3])


@pytest.mark.parametrize("how", ["not sharded", "sharded, vocabulary in pieces"])
def test_two_ranks_are_plain_pytorch(tiny_config, wide_model, ranks, tmp_path, how):
    unclipped = {"grad_clip": 1e3}
    config = changed(tiny_config, loss=TERMS, optimizer=unclipped, learner={"ranks": 2, "zero_stage": 0})
    if how != "not sharded":
        pieces = {"ranks": 2, "zero_stage": 3, "logits_mib": 1, "microbatch_tokens": 400}
        config = changed(config, model={"path": wide_model}, learner=pieces)
    work = prepare(groups(config), config, 0).work
    if how != "not sharded":
        # Eight positions a piece: the ranks have several, and not equally many.
        pieces = [[-(-len(batch.targets) // 8) for step in own for batch in step.batches] for own in work]
        assert min(map(min, pieces)) > 1
        assert pieces[0] != pieces[1]
    group = ranks(config)
    moments = assert_plain_pytorch(config, group, group.update(work), [1e-3])
    # DeepSpeed tells no norm where nothing is sharded; the mean gradient after one step is a tenth of the gradient.
    group.save(tmp_path)
    saved = ShardReader(tmp_path)
    for name, moment in moments.items():
        torch.testing.assert_close(saved.get(f"exp_avg/{name}"), moment, rtol=1e-3, atol=1e-7)


def test_two_ranks_of_sharded_parameters_take_several_optimizer_steps_and_resume_on_one(tiny_config, ranks, tmp_path):
    config = changed(
        tiny_config,
        loss=TERMS,
        optimizer={"warmup_updates": 2, "grad_clip": 0.05},
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
    assert metrics["grad_norm"] > 2 * config.optimizer.grad_clip
    assert_plain_pytorch(config, group, metrics, [1e-3 / 4, 1e-3 * 2 / 4])

    group.save(tmp_path)
    assert len(list(tmp_path.glob("random-*.safetensors"))) == 2
    assert_published(group, tmp_path / "channel")
    group.update(prepare(groups(config), config, 1).work)
    expected = published(group)
    group.stop()
    narrower = changed(
        config, learner={"ranks": 1, "zero_stage": 0, "offload_parameters": False, "microbatch_tokens": 100}
    )
    group = ranks(narrower)
    group.load(tmp_path)
    group.update(prepare(groups(narrower), narrower, 1).work)
    assert_same(published(group), expected, 1e-5)


def test_adapters_alone_are_trained_broadcast_and_saved(tiny_config, ranks, tmp_path):
    tree = tiny_config.model_dump()
    tree["model"]["lora"] = {"rank": 4, "alpha": 8}
    tree["loss"] |= TERMS
    config = Config.model_validate(tree)
    work = [prepare(groups(config), config, update).work for update in range(2)]
    group = ranks(config)
    base = read_weights(config.model.path)
    first = published(group)
    assert is_adapter(first)
    assert_same(merged(first, base), base, 0)
    assert_published(group, tmp_path / "channel")
    metrics = group.update(work[0])
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is the model without its adapters
    group.save(tmp_path)
    assert group.update(work[1])["kl"] > 1e-6
    expected = published(group)
    moved = merged(expected, base)
    assert max(float((moved[name] - base[name]).abs().max()) for name in base) > 1e-5
    group.load(tmp_path)
    metrics = group.update(work[1])
    assert_same(published(group), expected, 0)

    group.stop()
    wider = changed(config, learner={"ranks": 2, "zero_stage": 2})
    group = ranks(wider)
    group.load(tmp_path)
    on_two = group.update(prepare(groups(wider), wider, 1).work)
    assert_same(published(group), expected, 1e-5)
    assert on_two["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    assert on_two["kl"] == pytest.approx(metrics["kl"], rel=1e-4)


@pytest.mark.parametrize(("there", "wanted"), [(None, 0), (2.0, 1), (5.0, 1)])
def test_a_rank_asks_for_a_gpu_where_there_are_any(tiny_config, monkeypatch, there, wanted):
    asked = []

    def place(ranks, gpus):
        asked.append((ranks, gpus))
        raise RunStalled("no room")

    monkeypatch.setattr(rank_group, "_place", place)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": there} if there else {})
    with pytest.raises(RunStalled):
        start_ranks(changed(tiny_config, learner={"ranks": 2}))
    assert asked == [(2, wanted)]


def test_more_ranks_than_gpus_are_refused_and_not_put_on_the_cpu(tiny_config, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0, "learner": 3.0})
    with pytest.raises(RunStalled, match=r"learner\.ranks=2: each needs a GPU, and the Ray cluster has 1"):
        start_ranks(changed(tiny_config, learner={"ranks": 2}))


def poisoned(work, value, step):
    """The work with every advantage of one optimizer step replaced by a number that no gradient can hold."""
    spoil = lambda batch: replace(batch, advantage=np.full_like(batch.advantage, value))  # noqa: E731
    return [
        [replace(each, batches=[spoil(b) for b in each.batches]) if n == step else each for n, each in enumerate(own)]
        for own in work
    ]


@pytest.mark.parametrize(
    ("stage", "dtype", "count"), [(0, "float32", 2), (1, "float32", 2), (2, "bfloat16", 1), (3, "float32", 2)]
)
def test_an_update_that_is_not_finite_changes_nothing(tiny_config, ranks, tmp_path, stage, dtype, count):
    """Neither weights, moments, step count nor learning rate: what comes after is what would have come without it."""
    config = changed(
        tiny_config,
        model={"dtype": dtype},
        optimizer={"schedule": "linear"},
        learner={"ranks": count, "zero_stage": stage, "minibatches": 2},
    )
    work = [prepare(groups(config), config, update).work for update in range(2)]
    group = ranks(config)
    group.update(work[0])
    before = published(group)
    (tmp_path / "start").mkdir()
    group.save(tmp_path / "start")
    for bad in (float("nan"), float("inf"), 3e38):
        with pytest.raises(UpdateNotFinite, match="not finite"):
            group.update(poisoned(work[1], bad, step=0))
        assert_same(published(group), before, 0)
    assert group.finite(work[1])
    after_all = group.update(work[1])
    weights = published(group)
    group.load(tmp_path / "start")
    without = group.update(work[1])
    assert_same(weights, published(group), 0)
    assert after_all == without
    assert after_all["learning_rate"] == pytest.approx(config.optimizer.lr * rate_factor(3, config))
    with pytest.raises(RankFailed, match="optimizer step 2 of 2"):
        group.update(poisoned(work[1], 3e38, step=1))
