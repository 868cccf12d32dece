"""The commands of `analyze`, by what they do; `analyze.cli` puts them together."""
