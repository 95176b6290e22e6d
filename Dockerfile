# One image for every part of a swarm: `docker run IMAGE COMMAND ...` runs `swarm COMMAND ...`.
#
# BASE_IMAGE        any Debian-like image with Python 3.11 or newer as `python3`, venv included;
#                   for NVIDIA GPUs a CUDA runtime image that has one, with EXTRA=cuda.
# EXTRA             which optional dependencies are installed: server, or cuda.
# TORCH_INDEX_URL   where pip finds torch, when not where it finds everything else: PyTorch publishes
#                   CPU-only builds, which are gigabytes smaller, on an index of their own (its
#                   installation page names the address).
ARG BASE_IMAGE=python:3.11-slim

# Dependencies, on a stand-in for the package: a change of code neither installs nor copies torch again.
FROM ${BASE_IMAGE} AS dependencies
ARG EXTRA=server
ARG TORCH_INDEX_URL=
WORKDIR /src
RUN python3 -m venv /opt/swarm
ENV PATH=/opt/swarm/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY pyproject.toml ./
COPY swarm/version.py swarm/version.py
RUN touch swarm/__init__.py README.md LICENSE
RUN if [ -n "$TORCH_INDEX_URL" ]; then \
        pip install --index-url "$TORCH_INDEX_URL" "$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)"; \
    fi \
    && pip install ".[$EXTRA]" \
    && rm -rf build *.egg-info

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY server server
COPY client client
COPY swarm swarm
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE_IMAGE}
RUN useradd --create-home --uid 1000 swarm \
    && mkdir -p /var/lib/swarm /var/cache/swarm \
    && chown swarm:swarm /var/lib/swarm /var/cache/swarm
COPY --from=dependencies /opt/swarm /opt/swarm
COPY --from=wheel /wheels /wheels
RUN /opt/swarm/bin/pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl
COPY docker/entrypoint docker/healthcheck /usr/local/bin/
# /var/lib/swarm keeps identities and what containers tell each other, /var/cache/swarm keeps models.
ENV PATH=/opt/swarm/bin:$PATH SWARM_CACHE=/var/cache/swarm PYTHONUNBUFFERED=1
USER swarm
WORKDIR /home/swarm
VOLUME ["/var/lib/swarm", "/var/cache/swarm"]
# The first signal drains, as `swarm serve` promises; give it time with --stop-timeout.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=10m --retries=3 CMD ["healthcheck"]
ENTRYPOINT ["entrypoint"]
CMD ["--help"]
