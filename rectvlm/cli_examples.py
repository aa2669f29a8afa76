"""Examples at the end of each command's `--help`; a test parses all of them."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "rectvlm predict": (
        "rectvlm predict CT.nii.gz --checkpoint runs/demo/phase3 --out predictions",
        "rectvlm predict DICOM_FOLDER --checkpoint my-model --out predictions --series 3",
        "rectvlm predict dicomweb://localhost:8042/dicom-web/studies/1.2.3 --checkpoint my-model "
        "--out predictions --store dicomweb://localhost:8042/dicom-web",
    ),
    "rectvlm serve": (
        "rectvlm serve my-model",
        "RECTVLM_TOKEN=$(openssl rand -hex 16) rectvlm serve my-model --host 0.0.0.0",
    ),
    "rectvlm challenge": (
        "rectvlm challenge cts --task classification --checkpoint my-model --out results.json",
    ),
    "rectvlm evaluate": (
        "rectvlm evaluate --checkpoint runs/demo/phase3",
        "rectvlm evaluate --checkpoint my-model --shards data/shards/demo --split valid --limit 20",
    ),
    "rectvlm embed": (
        "rectvlm embed CT.nii.gz --checkpoint runs/demo/phase1 --out features.npz",
        "rectvlm embed data/shards/demo --checkpoint runs/demo/phase1 --out features.safetensors",
    ),
    "rectvlm probe": ("rectvlm probe features.safetensors --out probe.json",),
    "rectvlm train": (
        "rectvlm train 1 --config demo name=first",
        "rectvlm train 3 --processes 2 --resume auto",
    ),
    "rectvlm export": (
        "rectvlm export --checkpoint runs/demo/phase3 --out my-model --license apache-2.0",
    ),
    "rectvlm plan": (
        "rectvlm plan --config large --phase 3 --gpus 2",
        "rectvlm plan --config large --gpus 2,8,64 --json",
    ),
    "rectvlm runs": ("rectvlm runs list", "rectvlm runs compare runs/a/phase3 runs/b/phase3"),
    "rectvlm runs list": ("rectvlm runs list runs/demo --json",),
    "rectvlm runs compare": ("rectvlm runs compare runs/a/phase3 runs/b/phase3",),
    "rectvlm runs plot": ("rectvlm runs plot runs/a/phase3 runs/b/phase3 --out curves.png",),
    "rectvlm runs test": ("rectvlm runs test runs/a runs/b --out test.json",),
    "rectvlm weights": ("rectvlm weights list", "rectvlm weights pull llama-3.1-8b"),
    "rectvlm weights pull": (
        "rectvlm weights pull llama-3.1-8b",
        "rectvlm weights pull small --repo OWNER/NAME --part encoder --out weights",
    ),
    "rectvlm weights push": ("rectvlm weights push my-model --repo OWNER/NAME --public",),
    "rectvlm weights verify": ("rectvlm weights verify my-model",),
    "rectvlm weights pack": (
        "rectvlm weights pack meta-llama/Llama-3.1-70B-Instruct --out data/models/llama-70b-nf4",
    ),
    "rectvlm weights convert-labeler": (
        "rectvlm weights convert-labeler classifier.pth --encoder radbert --out labeler",
    ),
    "rectvlm weights list": ("rectvlm weights list --from https://mirror.example",),
    "rectvlm init": ("rectvlm init my.yaml --from small",),
    "rectvlm completion": (
        "rectvlm completion bash > ~/.local/share/bash-completion/completions/rectvlm",
        "rectvlm completion zsh > ~/.zfunc/_rectvlm",
        "rectvlm completion fish > ~/.config/fish/completions/rectvlm.fish",
    ),
    "rectvlm doctor": ("rectvlm doctor",),
    "rectvlm version": ("rectvlm version",),
}
"""Command lines by the command whose help shows them."""
