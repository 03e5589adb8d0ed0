"""Section of the configuration tree for `anchorage warmstart`, which makes a starter policy from scripted episodes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.config.section import Fraction, Section


class WarmstartPhase(Section):
    tokens: int = Field(16_000_000, ge=1000)
    """Tokens to train on, prompts included."""
    splits: tuple[str, ...] = ()
    """Splits whose tasks are played, equally often; none: `env.split`."""
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate of the layers' matrices (Muon), 0.6 of it for the rest (AdamW); warm-up over the
    first 2 %, cosine decay to a twentieth."""
    decay_tokens: int | None = Field(None, ge=1000)
    """Tokens that warm-up and decay take; none: the phase's. A phase that ends before leaves the rest to the next."""
    prompt_weight: float = Field(0.2, ge=0)
    """Weight of the cross-entropy on prompt tokens; 0 skips its computation."""
    astray_weight: float = Field(0.0, ge=0)
    """Extra weight of −log P(any intended token), the part of the divergence that makes invalid actions."""
    imitate: Literal["player", "expert"] = "player"
    """Whose probabilities to imitate along a scripted episode: those of its player, or the expert's choice."""
    expert_share: Fraction = 0.6
    """Share of the episodes that a noisy expert plays; habitual players without a goal play the others."""
    noise: tuple[Fraction, Fraction] = (0.0, 0.5)
    """Range of the expert's share of random actions, drawn once an episode."""
    slips: Fraction = 0.0
    """Share of the expert's actions that get a wrong number (`desk 2` for `desk 1`), to learn to recover."""
    avoid: tuple[str, ...] = ()
    """Actions that the expert does not take at random, such as one whose answer is long."""
    renumbered: Fraction = 0.0
    """Share of the episodes in which the numbers of names are permuted."""
    own_play: Fraction = 0.0
    """Share of the episodes that the policy, as it was when the phase began, plays instead of the scripted player; that
    one's probabilities are imitated in the states it reaches (DAgger, arXiv 1011.0686)."""


class WarmstartConfig(Section):
    vocab_size: int = Field(2048, ge=300)
    """Largest size of the byte-level BPE vocabulary."""
    hidden_size: int = Field(128, ge=8)
    intermediate_size: int = Field(256, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(4, ge=1)
    batch_tokens: int = Field(3072, ge=64)
    """Tokens of one optimizer step."""
    phases: tuple[WarmstartPhase, ...] = Field((WarmstartPhase(),), min_length=1)
    """What is imitated, one phase after the other."""
    threads: int = Field(2, ge=1)
