"""The contracts between the stages: one module per artifact, documented in docs/formats.md.

shards    WebDataset shards with indexes and a manifest      prepare -> pretrain, evaluate
run       run directory with checkpoints                     pretrain -> export, evaluate
weights   backbone weights as safetensors with metadata      export -> evaluate and other tools
results   results.json of an evaluation                      evaluate -> people and tables
"""
