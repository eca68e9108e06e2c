"""Where each inherited flag that works is tested, for the table of ``docs/flags.md``; a test holds it to the tests."""

from __future__ import annotations

TESTS = {
    name: f"tests/{file}"
    for file, names in {
        "train/test_training.py":
            "bf16 eval_steps max_grad_norm per_device_train_batch_size torch_compile torch_compile_backend",
        "train/test_data_order.py":
            "data_seed dataloader_drop_last dataloader_num_workers gradient_accumulation_steps ignore_data_skip "
            "max_steps num_train_epochs per_device_eval_batch_size save_steps train_sampling_strategy",
        "faults/test_elastic.py": "adam_epsilon average_tokens_across_devices save_total_limit",
        "train/test_identity.py":
            "adam_beta1 adam_beta2 learning_rate logging_steps resume_from_checkpoint weight_decay",
        "train/test_transformers_flags.py":
            "activation_checkpointing activation_checkpointing_kwargs bf16_full_eval "
            "dataloader_multiprocessing_context dataloader_prefetch_factor ddp_broadcast_buffers "
            "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout debug do_eval do_train eval_delay "
            "eval_do_concat_batches eval_on_start eval_strategy fp16_full_eval full_determinism "
            "gradient_checkpointing_kwargs hub_private_repo hub_strategy include_num_input_tokens_seen local_rank "
            "log_level log_level_replica log_on_each_node logging_nan_inf_filter lr_scheduler_kwargs "
            "lr_scheduler_type metric_for_best_model neftune_noise_alpha optim optim_args output_dir project "
            "restore_callback_states_from_checkpoint seed skip_memory_metrics torch_compile_mode "
            "torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id use_cache use_cpu "
            "warmup_steps",
        "train/test_predictions.py":
            "batch_eval_metrics eval_accumulation_steps include_for_metrics label_smoothing_factor "
            "prediction_loss_only",
        "train/test_family_lines.py": "disable_tqdm fp16 tf32",
        "train/test_lora_training.py": "gradient_checkpointing",
        "train/test_report_of_runs.py": "logging_strategy",
        "train/test_throughput.py": "logging_first_step",
        "train/test_run_report.py": "hub_token run_name",
        "train/test_engines.py": "deepspeed report_to",
        "train/test_resuming.py": "greater_is_better load_best_model_at_end save_strategy",
        "train/test_checkpoint.py": "save_only_model",
        "train/test_model_card.py": "hub_always_push hub_model_id hub_revision push_to_hub",
        "train/test_train_alternating.py": "dataloader_pin_memory",
        "train/test_feature_cache_training.py": "dataloader_persistent_workers",
        "train/test_sharding.py": "ddp_backend fsdp fsdp_config",
    }.items()
    for name in names.split()
}  # fmt: skip
"""The file of a flag."""
