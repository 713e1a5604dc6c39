"""Fine-tune a Whisper with transformers' Trainer, merge another fine-tune of the same base into it, save the result."""

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperForConditionalGeneration

from hsa.integrations.transformers import hsa_merge_


def train_and_merge(base, secondary, dataset, output, **training):
    model = WhisperForConditionalGeneration.from_pretrained(base)
    arguments = Seq2SeqTrainingArguments(output_dir=output, **training)
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.train()
    hsa_merge_(trainer.model, base, secondary, k=0.6, lam=0.5)  # in place; base is the directory, not the trained model
    trainer.save_model()
    return trainer.model
