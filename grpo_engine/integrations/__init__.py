"""The kernels inside other people's trainers, one file a host; none of them is imported before it
is used.

    pytorch   modules and functions for a loop of one's own (plain PyTorch, Hugging Face)
    trl       GRPOTrainer, patch_trl(), unpatch_trl()
    verl      loss_mode=grpo_engine and the log-prob op, found by verl through its plug-in group
    openrlhf  PolicyLoss, and Actor.forward without logits
    liger     Liger's signatures, for code that was written for it
    skyrl, slime, prime_rl    the functions their plug-in points take
    contract  what we rely on in a host, checked in its source without importing it
    head, padded    what they share: the head in mixed dtypes, the loss on [B, T] tensors
"""
