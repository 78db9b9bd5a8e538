"""Objectives that ask a discriminator."""
