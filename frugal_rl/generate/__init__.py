"""Generators: sources of rollouts. All answer `Request`s with `Rollout`s."""
