"""Data: from files to patches.

file -> Volume (io, volume) -> Dataset (dataset, check) -> Plan (plan, fingerprint) -> preprocessed cases
(preprocess, cache) -> patches (sampling, augment). Names are imported from the modules themselves, so that
nothing heavy is loaded before it is used.
"""
