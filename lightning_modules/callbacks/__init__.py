"""Callbacks that work with any module that keeps the contract of docs/architecture.md."""
