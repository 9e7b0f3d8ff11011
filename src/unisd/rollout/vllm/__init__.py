"""Generates rollouts by vLLM, in this process or on a server.

`vllm_mode=colocate` and `vllm_mode=server`.

Token ids go in and come out: text is never tokenised again. Each completion carries the
log-probabilities that its tokens were drawn with and the optimizer step of the weights that drew
them. Weights go over by vLLM's own calls: a LoRA adapter as an adapter, all weights by its
weight-transfer interface with a backend of ours (:mod:`unisd.rollout.vllm.transfer`), which works
on a CPU as well.

This file imports nothing: a server's processes load `plugin` and `transfer` from here, where little
else may be installed.
"""
