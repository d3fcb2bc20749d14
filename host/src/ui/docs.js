// Shows the host's OpenAPI document. Where callers show who they are, that is asked for; it stays in this page's memory.
"use strict";

const form = document.getElementById("key");
const fields = { bearer: "key-value", modal_key: "modal-key", modal_secret: "modal-secret" };
const shown = Object.fromEntries(Object.keys(fields).map((name) => [name, ""]));

const field = (name) => document.getElementById(fields[name]);

function headers() {
  const sent = {};
  if (shown.bearer) sent.authorization = `Bearer ${shown.bearer}`;
  if (shown.modal_key) sent["modal-key"] = shown.modal_key;
  if (shown.modal_secret) sent["modal-secret"] = shown.modal_secret;
  return sent;
}

function ask(why) {
  const tried = Object.values(shown).some(Boolean);
  document.getElementById("key-error").textContent = tried ? `This host doesn't know that: ${why}` : "";
  // A host may want two headers, with a key or without.
  document.getElementById("modal").hidden = !why.includes("modal-key");
  form.hidden = false;
  field("bearer").focus();
}

async function show() {
  document.getElementById("error").textContent = "";
  const answer = await fetch("openapi.json", { headers: headers(), cache: "no-cache" });
  if (answer.status === 401) {
    ask((await answer.json()).detail);
    return;
  }
  if (!answer.ok) {
    throw new Error(`openapi.json: ${answer.status} ${await answer.text()}`);
  }
  const spec = await answer.json();
  // The host's paths begin where this page's does, also behind a proxy that adds something before them.
  spec.servers = [{ url: new URL(".", location.href).href.replace(/\/$/, "") }];
  form.hidden = true;
  Object.keys(fields).forEach((name) => (field(name).value = ""));
  const page = SwaggerUIBundle({
    spec,
    dom_id: "#api",
    presets: [SwaggerUIBundle.presets.apis],
    layout: "BaseLayout",
    deepLinking: true,
    displayOperationId: true,
    docExpansion: "list",
    tryItOutEnabled: true,
    validatorUrl: null,
    syntaxHighlight: { activated: true },
  });
  const schemes = spec.components.securitySchemes || {};
  Object.entries(shown).forEach(([name, value]) => {
    if (value && schemes[name]) page.preauthorizeApiKey(name, value);
  });
}

async function show_or_tell() {
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    await show();
  } catch (why) {
    document.getElementById("error").textContent = `The host's API can't be shown: ${why.message}`;
  } finally {
    button.disabled = false;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  Object.keys(fields).forEach((name) => (shown[name] = field(name).value.trim()));
  show_or_tell();
});
show_or_tell();
