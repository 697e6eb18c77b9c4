# syntax=docker/dockerfile:1
# ComfyUI with this pack, on a CPU (default) or, with --build-arg BASE=cuda, on CUDA. Untried: written, and not built yet.
# docs/serving.md says how to run it.
ARG BASE=cpu

FROM python:3.12-slim-bookworm AS cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu COMFYUI_DEVICE=--cpu

FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS cuda
ENV TORCH_INDEX=https://download.pytorch.org/whl/cu128 COMFYUI_DEVICE=
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM ${BASE}
ARG COMFYUI=v0.33.0
# The commit of that tag; empty for another tag.
ARG COMFYUI_COMMIT=2f35f4a08176d993cded35dac3332be4f7287f41
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates git \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /venv
RUN git clone --depth 1 --branch "${COMFYUI}" https://github.com/comfyanonymous/ComfyUI.git /comfyui \
    && { [ -z "${COMFYUI_COMMIT}" ] || [ "$(git -C /comfyui rev-parse HEAD)" = "${COMFYUI_COMMIT}" ]; }
RUN /venv/bin/pip install --no-cache-dir torch torchvision torchaudio --index-url "${TORCH_INDEX}" \
    && /venv/bin/pip install --no-cache-dir -r /comfyui/requirements.txt opencv-python-headless
COPY . /comfyui/custom_nodes/ComfyUI-ControlNeXt
RUN /venv/bin/pip install --no-cache-dir -r /comfyui/custom_nodes/ComfyUI-ControlNeXt/requirements.txt
COPY <<'END' /comfyui/share.yaml
share:
  base_path: /models
  checkpoints: checkpoints
  clip_vision: clip_vision
  controlnet: controlnet
  controlnext: controlnext
  diffusion_models: diffusion_models
  loras: loras
  model_patches: model_patches
  text_encoders: text_encoders
  vae: vae
END
# Any user may run it (docker run --user), so that pictures belong to whoever asked for them.
RUN mkdir -p /models /input /output /state/user && chmod 1777 /input /output /state /state/user
ENV CONTROLNEXT_NO_TRAINING=1 PYTHONUNBUFFERED=1 HOME=/state
WORKDIR /comfyui
USER 1000
EXPOSE 8188
VOLUME ["/models", "/input", "/output"]
CMD ["sh", "-c", "exec /venv/bin/python main.py --listen 0.0.0.0 --port 8188 --disable-auto-launch ${COMFYUI_DEVICE} --extra-model-paths-config share.yaml --input-directory /input --output-directory /output --temp-directory /state --user-directory /state/user --database-url sqlite:////state/comfyui.db"]
