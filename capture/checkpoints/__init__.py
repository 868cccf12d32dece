"""Checkpoints of other makers: where they lie, of which step they are, and what they hold.

`find` lists them, `steps` reads the step off a name, `names` settles what the tensors are called.
One file per format gives the tensors as raw bytes: `safetensors_files`, `torch_files` and
`distributed`; `huggingface` knows which files of a folder are a model. Nothing here runs code that
a checkpoint brings along. Torch is loaded only for the formats that need it.
"""
