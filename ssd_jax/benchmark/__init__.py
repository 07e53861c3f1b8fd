"""The benchmark: modes, peers and ablations side by side, and what is written up of them.

Method: every prompt is decoded by all modes in turn, so that a disturbance of the machine hits
them alike; a run that had to compile is not recorded but repeated; seconds are those of the whole
call, from token ids to tokens and text, prompt included (before 2026-11-23 those of our own modes
were the loop's, which on a slow CPU left out up to 50 ms).

``results.json`` (schema 3) holds

``conditions``
  device, versions, models, options; ``stages`` names the stages by index, ``weight_bytes`` and
  ``cache_bytes_per_token`` are what a pass of a stage reads, ``plans`` the plan of each mode,
  and of ``MODE, sampled`` where sampled texts follow another (the tuner finds one for each kind).
``costs[mode][stage]`` (``MODE, sampled`` too, as in ``plans``)
  a pass of the stage alone: ``width`` tokens in ``seconds``, and, without logits,
  ``prefill_width`` tokens of the prompt in ``prefill_seconds`` and four times as many in
  ``wide_prefill_seconds``, in a cache of ``slots``; ``narrower``, the seconds by each other width
  that the oracle may choose. Means of what was timed after every prompt (before 2026-12-01 medians
  of what was timed at the end). Older files have no wide passes, and logits in all.
``records``
  one per prompt, mode, sampling and repeat: ``prompt`` (its index), ``dtype``, ``prompt_tokens``,
  ``seconds``, ``compile_seconds``, ``new_tokens``, ``characters``, ``tokens`` (ids),
  ``finish_reason``, ``passes`` by stage, ``round_tokens`` and ``round_passes`` (the same round
  by round), ``round_widths`` (tokens in the oracle's pass, round by round), ``origins`` (for each
  token the index of the stage that proposed it, one character each), ``relative_bandwidth``,
  ``min_margin``. What a peer does not tell is ``null``.
``summary[sampling][mode]``
  computed from records and costs alone:

  ``tokens_per_second``
    new tokens over seconds, both summed over the prompts, the seconds of a prompt being the median
    of its repeats
  ``speedup``
    ``tokens_per_second`` over that of the fastest own baseline of any dtype, over the prompts that
    both decoded
  ``speedup_interval``
    its 95 % interval, from 1,000 bootstrap samples of the prompts
  ``tokens_per_oracle_pass``
    new tokens over oracle passes, both summed
  ``characters_per_oracle_pass``
    characters over oracle passes, both summed; ``null`` where the stack has no tokenizer
  ``relative_bandwidth``
    bytes of weights and cache read per committed token over those of plain decoding (the paper's
    Table 1): mean over the prompts, weighted by new tokens
  ``overhead_share``
    1 - the seconds that its passes would take alone, prefill included, over its seconds (the
    paper's 35 %); look-ups, tree work and what the host does count as overhead
  ``acceptance_by_depth``
    share of the rounds that commit more than 1, 2, ... tokens
  ``repetitive_share``
    share of the prompts whose text holds one 8-gram of tokens more than 4 times: a model that
    loops makes every speculator look good
  ``ended_share``
    share of the prompts whose text ended itself, before the limit
  ``exact_match``
    ``[same, of]``: prompts all of whose repeats hold the tokens of the baseline's first repeat;
    ``null`` in another dtype, and for sampled peers, whose noise is another
  ``min_margin``
    the smallest score difference by which any token was chosen

``peers``
  the setting of each peer, the fastest of those that its users would try, and those that failed.
``roofline``
  what the device manages in a second, ``bandwidth`` in bytes and ``flops``, by the product of a
  large matrix with a vector and with a matrix; ``points``: operations for each byte of weights
  (``intensity``) and operations a second of the oracle's passes.
``examples``
  texts by origin and the trees of their first rounds, for the report.
``ablations``
  tables by name, each a list of rows, where asked for.
``peak_memory_bytes``
  of the device where it tells, else of the process.

Figures that need what was not measured are ``null``.
"""
