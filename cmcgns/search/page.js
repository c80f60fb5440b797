"use strict";
const element = (id) => document.getElementById(id);
const drop = element("drop");

// the part after # never goes to a server
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}

let latest = 0;

async function ask(kind, body) {
  const number = ++latest;
  say("Searching ...");
  element("answer").replaceChildren();
  const headers = { "X-Cmcgns-Query": kind, "Content-Type": "application/octet-stream" };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  try {
    const k = encodeURIComponent(element("k").value);
    const response = await fetch(`/search?k=${k}`, { method: "POST", headers, body });
    const text = await response.text();
    if (number !== latest) return;
    element("access").hidden = response.status !== 401;
    if (response.status === 413) return say("The server refused the size of the file (search.upload_mib).", true);
    if (!response.ok) return say(text, true);
    say("");
    element("answer").innerHTML = text; // the server escapes every text, and the page's policy runs no script in it
  } catch {
    if (number === latest) say("The server does not answer, or it refused the size of the file.", true);
  }
}

function say(text, wrong = false) {
  element("message").textContent = text;
  element("message").classList.toggle("wrong", wrong);
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = element("text").value.trim();
  if (text) ask("text", text);
  else say("Type a sentence, or drop a film.", true);
});
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    element("ask").requestSubmit();
  }
});
element("file").addEventListener("change", (event) => {
  const file = event.target.files[0];
  if (file) ask("film", file);
  event.target.value = ""; // so that the same file can be chosen again
});
element("access").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", element("token").value.trim());
  element("token").value = "";
  element("access").hidden = true;
  say("Search again.");
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  const file = event.dataTransfer.files[0];
  if (file) ask("film", file);
});
