"""Tests of the adapters with the engines that they are for, each in an environment of its own."""
