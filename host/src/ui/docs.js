// Shows the host's OpenAPI document. Where callers show keys, one is asked for; it stays in this page's memory.
"use strict";

const form = document.getElementById("key");
const error = document.getElementById("error");
let key = null;

const withKey = (headers) => (key ? { ...headers, authorization: `Bearer ${key}` } : headers);

async function show() {
  const answer = await fetch("openapi.json", { headers: withKey({}), cache: "no-cache" });
  if (answer.status === 401) {
    form.hidden = false;
    document.getElementById("key-error").textContent = key ? "This key is none of this host's." : "";
    document.getElementById("key-value").focus();
    return;
  }
  if (!answer.ok) {
    throw new Error(`openapi.json: ${answer.status} ${await answer.text()}`);
  }
  const spec = await answer.json();
  form.hidden = true;
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
  if (key) {
    page.preauthorizeApiKey("bearer", key);
  }
}

function tell(why) {
  error.textContent = `The host's API can't be shown: ${why.message}`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = document.getElementById("key-value").value.trim();
  show().catch(tell);
});
show().catch(tell);
