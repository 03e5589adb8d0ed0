"""Section of the configuration tree for `anchorage warmstart`, which trains a starter policy on scripted episodes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.config.section import Fraction, Section


class WarmstartPhase(Section):
    tokens: int = Field(16_000_000, ge=1000)
    """Number of tokens to train on, prompts included."""
    splits: tuple[str, ...] = ()
    """Splits whose tasks are played, equally often. Empty: `env.split`."""
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate of the layers' matrices (Muon); the other parameters (AdamW) get 0.6 of it. Linear warm-up
    over the first 2 %, then cosine decay to a twentieth."""
    decay_tokens: int | None = Field(None, ge=1000)
    """Number of tokens over which warm-up and decay extend. `null`: the phase's tokens. A phase that ends earlier
    leaves the rest of the decay to the next phase."""
    prompt_weight: float = Field(0.2, ge=0)
    """Weight of the cross-entropy on prompt tokens. 0: it is not computed."""
    astray_weight: float = Field(0.0, ge=0)
    """Weight of the additional term −log P(any intended token), the part of the divergence that causes invalid
    actions."""
    imitate: Literal["player", "expert"] = "player"
    """What to imitate in a scripted episode. `player`: its player's action probabilities. `expert`: the expert's
    choice."""
    expert_share: Fraction = 0.6
    """Share of episodes that a noisy expert plays; habitual players without a goal play the others."""
    noise: tuple[Fraction, Fraction] = (0.0, 0.5)
    """Range of the expert's share of random actions, drawn once per episode."""
    slips: Fraction = 0.0
    """Share of the expert's actions that get a wrong number (`desk 2` instead of `desk 1`), so that the policy learns
    to recover."""
    avoid: tuple[str, ...] = ()
    """Actions that the expert never takes at random, such as one with a long observation."""
    renumbered: Fraction = 0.0
    """Share of episodes in which the numbers of names are permuted."""
    episodes: int | None = Field(None, ge=1)
    """Number of episodes that are played. Once they are used up, they are used again, in another order. `null`: as many
    as the tokens need."""
    own_play: Fraction = 0.0
    """Share of episodes that the policy plays itself, as it was at the start of the phase. It imitates the scripted
    player's probabilities in the states that it reaches (DAgger, arXiv 1011.0686)."""


class WarmstartConfig(Section):
    vocab_size: int = Field(2048, ge=300)
    """Maximum size of the byte-level BPE vocabulary, in tokens."""
    phrases: int = Field(0, ge=0)
    """Maximum number of phrases that become one token each, such as `, go to` in lists of actions. They are part of
    `vocab_size`."""
    hidden_size: int = Field(128, ge=8)
    """Width of the model's hidden states."""
    intermediate_size: int = Field(256, ge=8)
    """Width of the MLPs."""
    layers: int = Field(3, ge=1)
    """Number of transformer layers."""
    heads: int = Field(4, ge=1)
    """Number of attention heads."""
    kv_heads: int = Field(4, ge=1)
    """Number of key-value heads."""
    batch_tokens: int = Field(3072, ge=64)
    """Number of tokens in one optimizer step."""
    phases: tuple[WarmstartPhase, ...] = Field((WarmstartPhase(),), min_length=1)
    """Training phases, one after the other, each with its own players, tasks and learning rate."""
    threads: int = Field(2, ge=1)
    """Number of CPU threads."""
