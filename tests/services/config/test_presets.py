from __future__ import annotations

import pytest

from services.config import ConfigError, load_config
from services.config.presets import PRESETS
from services.config.tree import Config, LossConfig


def test_an_algorithm_alone_does_what_its_paper_says() -> None:
    dapo, gspo, dr_grpo = (load_config(None, [f"algorithm={name}"]) for name in ("dapo", "gspo", "dr_grpo"))
    assert (dapo.loss.clip_low, dapo.loss.clip_high, dapo.loss.kl_coef) == (0.2, 0.28, 0.0)
    assert dapo.learner.dynamic_sampling
    assert (gspo.loss.ratio, gspo.loss.aggregation, gspo.loss.clip_high) == ("sequence", "sequence", 4e-4)
    assert (dr_grpo.loss.aggregation, dr_grpo.advantage.normalisation) == ("constant", "mean")
    assert load_config(None, ["algorithm=reinforce_pp"]).loss.kl_in == "reward"
    graphgpo = load_config(None, ["algorithm=graphgpo"])
    assert (graphgpo.advantage.gamma, graphgpo.advantage.similarity_of) == (0.1, "graph")


def test_the_base_group_of_hgpo_is_refused_in_the_papers_form() -> None:
    with pytest.raises(ConfigError, match=r"advantage\.base_group: requires advantage\.history_form=published"):
        load_config(None, ["algorithm=hgpo", "advantage.base_group=true", "advantage.history_form=paper"])


def test_what_is_given_wins_also_where_it_is_the_default() -> None:
    config = load_config(None, ["algorithm=dapo", "loss.clip_high=0.2", "learner.dynamic_sampling=false"])
    assert (config.loss.clip_high, config.learner.dynamic_sampling) == (0.2, False)
    assert config.loss.kl_coef == 0.0
    whole = Config(algorithm="dapo", loss=LossConfig(clip_high=0.3))
    assert (whole.loss.clip_high, whole.loss.kl_coef) == (0.3, 0.0)


@pytest.mark.parametrize("algorithm", PRESETS)
def test_presets_name_fields_that_there_are_and_survive_a_dump(algorithm: str) -> None:
    config = load_config(None, [f"algorithm={algorithm}"])
    dumped = config.model_dump()
    for section, fields in PRESETS[algorithm].items():
        assert fields.items() <= dumped[section].items()
    assert Config.model_validate(dumped | {"algorithm": "gigpo"}).loss == config.loss


def test_without_a_preset_nothing_changes() -> None:
    assert load_config(None, ["algorithm=grpo"]) == Config(algorithm="grpo")
    assert Config(algorithm="grpo").loss == Config().loss
