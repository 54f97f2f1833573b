"""Configs: one module per training run, each with a `config` and its small `sample`."""
