"""Where a run computes, never what: FSDP2, ZeRO, collectives."""
