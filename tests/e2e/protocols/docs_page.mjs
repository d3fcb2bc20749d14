// A browser on the page at /docs: `node docs_page.mjs CHROMIUM TOOLS ADDRESS KEY SCREENSHOT < PIXELS`. It prints what it saw.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";

const [program, tools, address, key, screenshot] = process.argv.slice(2);
const { chromium } = createRequire(`${tools}/`)("playwright-core");
const pixels = JSON.parse(readFileSync(0, "utf8"));

// Root has no sandbox of its own; what is looked at is this host's page alone.
const browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
const saw = { elsewhere: [], errors: [] };
try {
  const page = await browser.newPage({ viewport: { width: 1280, height: 1100 } });
  const violations = "violates the following Content Security Policy";
  page.on("request", (request) => {
    if (!request.url().startsWith(`http://${address}/`) && !request.url().startsWith("data:")) {
      saw.elsewhere.push(request.url());
    }
  });
  page.on("pageerror", (error) => saw.errors.push(error.message));
  page.on("console", (message) => {
    // That a key is missing, or wrong, is what is tried.
    const isOfKey = message.text().includes("401");
    if (message.text().includes(violations) || (message.type() === "error" && !isOfKey)) {
      saw.errors.push(message.text());
    }
  });
  await page.goto(`http://${address}/docs`);
  await page.fill("#key-value", "no key of this host");
  await page.click("#key button");
  await page.locator("#key-error").getByText("doesn't know that").waitFor();
  await page.fill("#key-value", key);
  await page.click("#key button");

  const operation = page.locator(".opblock", { hasText: "run_digits" });
  await operation.locator(".opblock-summary-control").click();
  await operation.locator("textarea").fill(JSON.stringify({ pixels }));
  const answer = page.waitForResponse((response) => response.url().endsWith("/models/digits/predict"));
  await operation.locator("button.execute").click();
  saw.sent = (await answer).status();
  const shown = operation.locator(".live-responses-table .response .highlight-code").first();
  await shown.waitFor();
  saw.shown = await shown.innerText();
  saw.title = await page.title();
  const { x, y, width } = await operation.boundingBox();
  const top = y + (await page.evaluate(() => window.scrollY));
  await page.screenshot({
    path: screenshot,
    fullPage: true,
    clip: { x: 0, y: top - 70, width: x * 2 + width, height: 1750 },
    // It has the key in it.
    mask: [operation.locator(".curl-command")],
    maskColor: "#333333",
  });
} finally {
  await browser.close();
}
console.log(JSON.stringify(saw));
