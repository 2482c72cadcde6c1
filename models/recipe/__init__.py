"""Make the tiny key/value recall model: tokenizer, initialization, data, training, evaluation."""
