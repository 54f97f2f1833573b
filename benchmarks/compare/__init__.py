"""Optimizers compared on small workloads."""
