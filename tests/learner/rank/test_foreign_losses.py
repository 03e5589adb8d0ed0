"""Loss functions from outside: the same door, aggregated as PPO's, checked before anything starts."""

from textwrap import dedent

import pytest
import torch

from anchorage.checks.preflight import Start, preflight
from learner.rank.losses import check, policy_loss
from services.config import Config
from services.config.tree import LossConfig
from services.errors import PreflightFailed
from tests.learner.rank.test_losses import tokens

REINFORCE = """
    from pydantic import BaseModel
    from learner.rank.losses import TokenLosses

    class Params(BaseModel):
        scale: float = 1.0

    def mine(batch, config, params: Params):
        loss = -params.scale * batch.advantage * batch.logprob
        return TokenLosses(loss, {"surprise": -batch.logprob}, ("surprise",))
"""


def config(folder, text, **loss):
    (folder / "mine.py").write_text(dedent(text))
    return LossConfig.model_validate({"function": f"{folder}/mine.py:mine", **loss})


def test_its_token_losses_are_aggregated_as_those_of_ppo(tmp_path):
    batch = tokens()
    own = config(tmp_path, REINFORCE, params={"scale": 2.0}, kl_coef=0.0, entropy_coef=0.5)
    terms = policy_loss(batch, own, 5.0)
    expected = (-2.0 * batch.advantage * batch.logprob - 0.5 * batch.entropy).sum() / 5.0
    torch.testing.assert_close(terms.loss, expected)
    assert {"surprise", "logprob_gap", "sampler_kl", "entropy", "tokens"} <= terms.sums.keys()
    assert terms.maxima["surprise"] == (-batch.logprob).max()
    assert list(check(own)) == []


def test_kl_and_the_mean_over_responses_work_with_it(tmp_path):
    batch = tokens()
    own = config(tmp_path, REINFORCE, aggregation="sequence", kl_coef=0.1, kl_in="reward")
    plain = config(tmp_path, REINFORCE, aggregation="sequence", kl_coef=0.0)
    assert policy_loss(batch, own, 4.0).sums["kl"] != 0
    assert policy_loss(batch, own, 4.0).loss != policy_loss(batch, plain, 4.0).loss
    assert not own.skips_zero_advantage
    assert LossConfig(kl_coef=0.0).skips_zero_advantage


def test_the_built_in_one_passes_the_check_whatever_it_is_set_to():
    for changes in ({}, {"kl_coef": 0.0, "importance_cap": None}, {"ratio": "sequence", "kl_in": "reward"}):
        assert list(check(LossConfig.model_validate(changes))) == []


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("batch.advantage.sum()", "its loss must have one value for each of 9 tokens, got the shape []"),
        ("3.0", "its loss must be a tensor, got float"),
        ("batch.advantage + 0", "its loss has no gradient: it must depend on batch.logprob"),
        ("batch.logprob * 0", "the gradient of its loss by batch.logprob is missing, 0 everywhere or not finite"),
        ("batch.logprob / 0", "its loss is"),
        ("batch.logprob * batch.advantage.mul_(2)", "it changes batch.advantage; copy it first"),
        ("batch.no_such", "AttributeError: 'TokenBatch' object has no attribute 'no_such' (mine.py:1)"),
    ],
)
def test_what_is_wrong_is_one_line_of_the_preflight(tmp_path, body, line):
    own = config(tmp_path, f"def mine(batch, config): return {body}\n")
    with pytest.raises(PreflightFailed) as caught:
        preflight(Start(Config(loss=own), trains=True))
    [found] = str(caught.value).splitlines()
    assert found.startswith("loss.function=")
    assert line in found


def test_parameters_of_the_built_in_one_are_refused():
    [line] = check(LossConfig(params={"beta": 1}))
    assert line == "loss.params.beta: loss.function=ppo takes no parameters (it has no argument `params`)"
