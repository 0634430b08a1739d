FROM python:3.11-slim-bookworm

COPY pyproject.toml README.md /src/
COPY stortrends_ha /src/stortrends_ha
RUN pip install --no-cache-dir /src && rm -r /src

VOLUME /var/lib/stortrends-ha
ENTRYPOINT ["stortrends-ha"]
CMD ["--help"]
