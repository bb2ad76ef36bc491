"""From prepared prompts to tokens: scheduling, paging, packing, and the one file that talks to the device."""
