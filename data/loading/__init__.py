"""From stored tokens to the batch of a step: order, mixture, packing."""
